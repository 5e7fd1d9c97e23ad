"""Steps and memory that a device refuses the TensorRT backend: a sentence, and the next step works."""

from pathlib import Path

import numpy as np
import pytest
from support.engine_bundle import on_cpu
from support.fake_device import FakeCudart
from support.fake_tensorrt import FakeContext, FakeTensorRT

from gemma_export.errors import DeviceError
from gemma_export.runtime.session import load

# A rule that is broken while memory is given back has nobody to raise it to.
pytestmark = pytest.mark.filterwarnings("error")

TOKENS = [2, 651, 17, 1290, 9, 88, 402, 1011, 7, 30, 256, 3, 77]


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        ("execute_async_v3", 1, "a kernel could not be launched"),
        ("cudaMemcpyAsync", 700, "cudaErrorIllegalAddress"),
        ("cudaStreamSynchronize", 719, "cudaErrorLaunchFailure"),
    ],
)
@pytest.mark.parametrize("prompt", [[5], TOKENS], ids=["decode", "prefill"])
def test_after_a_step_that_failed_the_next_one_works(
    engine_bundle: Path,
    tensorrt: FakeTensorRT,
    cudart: FakeCudart,
    function: str,
    error: int,
    message: str,
    prompt: list[int],
) -> None:
    session, reference = load(engine_bundle), on_cpu(engine_bundle)
    ours, theirs = session.new_cache(), reference.new_cache()
    session.step([TOKENS], ours)
    reference.step([TOKENS], theirs)
    session.step([[3]], ours)
    reference.step([[3]], theirs)
    cudart.fail(function, cudart.cudaError_t(error))
    with pytest.raises(DeviceError, match=message):
        session.step([prompt], ours)
    assert ours.lengths.tolist() == [len(TOKENS) + 1]
    np.testing.assert_allclose(session.step([prompt], ours), reference.step([prompt], theirs), atol=1e-4)


def test_what_was_half_told_is_told_again(
    engine_bundle: Path, tensorrt: FakeTensorRT, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step that fails behind the change of the profile, before all shapes are set."""
    session, reference = load(engine_bundle), on_cpu(engine_bundle)
    ours, theirs = session.new_cache(), reference.new_cache()
    for each, cache in ((session, ours), (reference, theirs)):
        each.step([[5]], cache)
    with monkeypatch.context() as patch:
        patch.setattr(FakeContext, "set_tensor_address", lambda self, name, memory: False)
        with pytest.raises(DeviceError, match="could not take the address of input_ids on Fake GPU"):
            session.step([[7, 8]], ours)
    np.testing.assert_allclose(session.step([[6]], ours), reference.step([[6]], theirs), atol=1e-4)


def test_an_error_tells_its_own_reason(
    engine_bundle: Path, tensorrt: FakeTensorRT, cudart: FakeCudart
) -> None:
    session = load(engine_bundle)
    cache = session.new_cache()
    cudart.fail("execute_async_v3", 1)
    with pytest.raises(DeviceError, match=r"could not run a step .* a kernel could not be launched"):
        session.step([[5]], cache)
    session.step([[5]], cache)
    tensorrt.engines[-1].contexts[-1].addresses.pop("logits")
    with pytest.raises(DeviceError, match=r"could not run a step .* logits has no address"):
        session.step([[5]], cache)


def test_an_interrupted_step_leaves_nothing_under_way(
    engine_bundle: Path, tensorrt: FakeTensorRT, cudart: FakeCudart, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = load(engine_bundle)
    cache = session.new_cache()

    def interrupt(stream: object) -> None:
        monkeypatch.undo()
        raise KeyboardInterrupt

    monkeypatch.setattr(cudart, "cudaStreamSynchronize", interrupt)
    with pytest.raises(KeyboardInterrupt):
        session.step([[5]], cache)
    cudart.require_idle("the step was interrupted")
    assert cache.length == 0


def test_no_room_for_a_cache_is_told_in_numbers(
    engine_bundle: Path, tensorrt: FakeTensorRT, cudart: FakeCudart
) -> None:
    session = load(engine_bundle)
    cudart.total = cudart.used + (1 << 20)
    with pytest.raises(DeviceError) as caught:
        session.new_cache(64)
    assert "no room for a cache of 64 rows of 64 tokens: 2 MiB are needed, 1 MiB of 2 MiB" in str(
        caught.value
    )
    assert "--max-length" in caught.value.hint
    assert session.generate("a", max_new_tokens=2).tokens  # One row still fits.


def test_no_room_for_the_weights_is_told_in_numbers(
    engine_bundle: Path, tensorrt: FakeTensorRT, cudart: FakeCudart
) -> None:
    cudart.total = 1 << 16
    with pytest.raises(
        DeviceError, match="no room for the weights: 1 MiB are needed, 0 MiB of 0 MiB are free"
    ):
        load(engine_bundle)


def test_no_room_for_a_context_is_told_in_numbers(
    engine_bundle: Path, tensorrt: FakeTensorRT, cudart: FakeCudart
) -> None:
    cudart.total = (engine_bundle / "engines" / "model.engine").stat().st_size
    cudart.fail("create_execution_context", 2)
    with pytest.raises(DeviceError, match="no room for what a step computes"):
        load(engine_bundle)
