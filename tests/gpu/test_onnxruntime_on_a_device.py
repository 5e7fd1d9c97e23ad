"""The shipped model under onnxruntime's CUDA provider, on this machine's GPU, held against its CPU provider.

Needs onnxruntime-gpu in place of onnxruntime; its CPU provider runs the reference.
"""

import numpy as np
import pytest

from gemma_export.errors import ContextFullError, DeviceError, MissingDependencyError
from gemma_export.exporter.pipeline import build
from gemma_export.exporter.request import BuildRequest
from gemma_export.runtime.session import Session, load

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

SLOTS = 256

# The largest error of a logit relative to the largest logit: 11 and 8 significant bits through the layers,
# and what rounding the weights to 8 and 4 bits adds. A wrong slot, scale or rotation is an error of order 1.
TOLERANCE = {"fp16": 0.02, "bf16": 0.08, "int8": 0.08, "int4": 0.5}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Session:
    """The same weights in fp32 on the CPU."""
    output = tmp_path_factory.mktemp("gpu") / "cpu"
    return load(build(BuildRequest(size="tiny", output=output, max_length=SLOTS, parity="none")).path)


@pytest.fixture(scope="module", params=TOLERANCE)
def session(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Session:
    output = tmp_path_factory.mktemp("gpu") / request.param
    bundle = build(
        BuildRequest(
            size="tiny",
            precision=request.param,
            target="cuda",
            max_length=SLOTS,
            output=output,
            parity="none",
        )
    )
    try:
        return load(bundle.path)
    except (DeviceError, MissingDependencyError) as error:
        pytest.skip(error.message)


def test_logits_through_prefill_and_cached_steps(session: Session, reference: Session) -> None:
    tokens = session.tokenizer.encode("The quick brown fox jumps over the lazy dog, and then it runs away.")
    ours, theirs = session.new_cache(), reference.new_cache()
    tolerance = TOLERANCE[session.manifest.precision]
    for start, stop in ((0, 1), (1, 12), (12, 13), (13, len(tokens))):
        found = session.step([tokens[start:stop]], ours)[0, -1]
        wanted = reference.step([tokens[start:stop]], theirs)[0, -1]
        assert np.abs(found - wanted).max() <= tolerance * np.abs(wanted).max()
    for layer in range(session.manifest.model.num_layers):
        wanted = theirs.keys(layer)
        assert np.abs(ours.keys(layer) - wanted).max() <= tolerance * np.abs(wanted).max()


def test_rows_of_a_batch_are_each_their_own(session: Session) -> None:
    prompts = ["Once upon a time", "The", "A long and winding road led over the hills to"]
    together = session.generate_batch(prompts, max_new_tokens=24)
    for prompt, completion in zip(prompts, together, strict=True):
        assert completion.text == str(session.generate(prompt, max_new_tokens=24))


def test_a_full_cache_is_refused_and_the_session_goes_on(session: Session) -> None:
    cache = session.new_cache()
    session.step([[2] * SLOTS], cache)
    with pytest.raises(ContextFullError):
        session.step([[2]], cache)
    cache.truncate(10)
    assert np.isfinite(session.step([[5]], cache)).all()
