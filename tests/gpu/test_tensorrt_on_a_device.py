"""Engines of the shipped model on the GPU of this machine, held against onnxruntime on its CPU."""

import gc
from pathlib import Path

import numpy as np
import pytest

from gemma_export.errors import DeviceError, GemmaExportError, MissingDependencyError
from gemma_export.exporter.engines.options import RTX_SMS, EngineOptions
from gemma_export.exporter.pipeline import build
from gemma_export.exporter.request import BuildRequest
from gemma_export.runtime.cuda import CudaDevice, load_cudart
from gemma_export.runtime.session import Session, load

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

PROMPTS = ["Once upon a time", "The", "A long and winding road led over the hills to"]
SLOTS = 256


@pytest.fixture(scope="module")
def device() -> CudaDevice:
    try:
        return CudaDevice(load_cudart("rtx"))
    except (DeviceError, MissingDependencyError) as error:
        pytest.skip(error.message)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Session:
    """The same weights in fp32 on the CPU."""
    output = tmp_path_factory.mktemp("gpu") / "cpu"
    return load(build(BuildRequest(size="tiny", output=output, max_length=SLOTS, parity="none")).path)


@pytest.fixture(scope="module", params=["fp16", "bf16", "int8", "int4"])
def session(
    request: pytest.FixtureRequest, device: CudaDevice, tmp_path_factory: pytest.TempPathFactory
) -> Session:
    """The bundle whose engine runs here: TensorRT for RTX where it knows the device, TensorRT where not."""
    target = "rtx" if device.sm in RTX_SMS else "tensorrt"
    if device.sm == 75 and request.param in ("bf16", "int4"):
        pytest.skip("SM 75 has neither")
    options = EngineOptions(sms=(device.sm,) if target == "rtx" else (), max_batch=4, prefill_chunk=16)
    output = tmp_path_factory.mktemp("gpu") / request.param
    try:
        bundle = build(
            BuildRequest(
                size="tiny",
                precision=request.param,
                target=target,
                max_length=SLOTS,
                engines=options,
                output=output,
                parity="none",
            )
        )
    except MissingDependencyError as error:
        pytest.skip(error.message)
    return load(bundle.path)


# Largest error of a logit relative to the largest logit: 11 and 8 significant bits through the layers, and
# what rounding the weights to 8 and 4 bits adds. A wrong mask, slot or scale is an error of order 1.
TOLERANCE = {"fp16": 0.02, "bf16": 0.08, "int8": 0.08, "int4": 0.5}


def test_logits_through_prefill_and_cached_steps(session: Session, reference: Session) -> None:
    tokens = session.tokenizer.encode("The quick brown fox jumps over the lazy dog, and then it runs away.")
    ours, theirs = session.new_cache(), reference.new_cache()
    tolerance = TOLERANCE[session.manifest.precision]
    for start, stop in ((0, 1), (1, 19), (19, len(tokens))):  # One token, more than a chunk, the rest.
        found = session.step([tokens[start:stop]], ours)[0, -1]
        wanted = reference.step([tokens[start:stop]], theirs)[0, -1]
        assert np.abs(found - wanted).max() <= tolerance * np.abs(wanted).max()
    for token in reference.generate_tokens(tokens, max_new_tokens=200, stop_tokens=()):
        found = session.step([[token]], ours)[0, -1]
        wanted = reference.step([[token]], theirs)[0, -1]
        assert np.abs(found - wanted).max() <= tolerance * np.abs(wanted).max()


def test_keys_are_where_they_belong(session: Session, reference: Session) -> None:
    tokens = session.tokenizer.encode(PROMPTS[2])
    ours, theirs = session.new_cache(), reference.new_cache()
    session.step([tokens], ours)
    reference.step([tokens], theirs)
    wanted = theirs.keys(0).astype(np.float32)
    error = np.abs(ours.keys(0).astype(np.float32) - wanted).max()
    assert error <= TOLERANCE[session.manifest.precision] * np.abs(wanted).max()


def test_a_batch_says_what_each_row_says_alone(session: Session) -> None:
    # Rows of a batch are multiplied in another order than one alone: the first tokens are not that close.
    alone = [session.generate(prompt, max_new_tokens=4).tokens for prompt in PROMPTS]
    assert [row.tokens for row in session.generate_batch(PROMPTS, max_new_tokens=4)] == alone


def test_the_same_twice(session: Session) -> None:
    first = session.generate(PROMPTS[0], max_new_tokens=32).tokens
    assert session.generate(PROMPTS[0], max_new_tokens=32).tokens == first


def test_after_an_error_the_next_step_works(session: Session) -> None:
    cache = session.new_cache()
    session.step([[2, 5]], cache)
    wanted = session.step([[7]], cache)
    cache.truncate(2)
    with pytest.raises(GemmaExportError):
        session.new_cache(1 << 24)
    np.testing.assert_array_equal(session.step([[7]], cache), wanted)


def test_the_next_load_finds_the_compiled_kernels(session: Session) -> None:
    if session.manifest.target != "rtx":
        pytest.skip("TensorRT has no runtime cache")
    folder: Path = session.bundle.path.with_name(f"{session.bundle.path.name}.runtime-cache")
    second = load(session.bundle.path)
    second.step([[2]], second.new_cache())
    del second
    gc.collect()
    assert any(path.stat().st_size for path in folder.iterdir())
