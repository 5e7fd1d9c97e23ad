"""The kernels in a session: they run in place of onnxruntime's, over the file's own memory, or not at all."""

import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from support.matmul_nbits import BUILT_IN, Floats, Product, available, running, session
from support.memory import anonymous, needs_linux

from gemma_export.exporter.pipeline import build
from gemma_export.exporter.request import BuildRequest
from gemma_export.runtime import native
from gemma_export.runtime.bundle import open_bundle
from gemma_export.runtime.native import kernels, library
from gemma_export.runtime.onnxruntime import OnnxRuntimeBackend
from gemma_export.runtime.session import load

KERNELS = available()
compiled = pytest.mark.skipif(not KERNELS, reason="the kernels are not compiled here")

PROMPT = "Where is the king?"


@pytest.fixture(scope="module", params=["int8", "int4"])
def quantized_bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped model, measured against its checkpoint; outside of its budget there would be no bundle."""
    output = tmp_path_factory.mktemp("native") / request.param
    scheme = {"int8": "w8a16", "int4": "w4a16"}[request.param]
    return build(
        BuildRequest(
            output=output,
            size="tiny",
            precision=request.param,
            scheme_name=scheme,
            no_calibration=True,
            parity="quick",
        )
    ).path


@compiled
@needs_linux
def test_weights_are_not_copied(tmp_path: Path) -> None:
    # So large that malloc never answers with memory that was freed before.
    product = Product(rows=32768, blocks=8, block=256, bits=8)
    path = tmp_path / "product.onnx"
    onnx.save(product.graph(), path, save_as_external_data=True, location="product.data")
    x = np.ones((1, product.columns), np.float32)

    before = anonymous()
    running_session = session(path, KERNELS[-1])
    running_session.run(None, {"x": x})
    assert anonymous() - before < product.codes.nbytes // 4

    before = anonymous()
    copy = product.codes.copy()
    assert anonymous() - before > copy.nbytes // 2, "A copy would not be seen."


@compiled
@pytest.mark.slow
def test_a_bundle_says_the_same_with_them_and_without(quantized_bundle: Path) -> None:
    logits = {name: last_logits(quantized_bundle, name) for name in (*KERNELS, BUILT_IN)}
    # Codes of x that lie between two numbers may be rounded to either; a logit is off by far less than the
    # difference of one weight's code would make of it.
    spread = np.ptp(logits[BUILT_IN])
    for name in KERNELS:
        assert np.abs(logits[name] - logits[BUILT_IN]).max() < 0.01 * spread, name


def last_logits(bundle: Path, name: str) -> Floats:
    with running(name):
        opened = load(bundle, threads=2)
    return opened.logits(opened.tokenizer.encode(PROMPT))[-1]


@compiled
@pytest.mark.slow
def test_a_bundle_writes_with_them(quantized_bundle: Path) -> None:
    for name in KERNELS:
        with running(name):
            opened = load(quantized_bundle, threads=2)
        written = opened.generate_tokens(opened.tokenizer.encode(PROMPT), max_new_tokens=24)
        # The same tokens at once say the same as they did one by one.
        prompt = [*opened.tokenizer.encode(PROMPT), *written]
        again = opened.logits(prompt).argmax(-1)[-len(written) - 1 : -1]
        assert again.tolist() == written, name


@pytest.mark.slow
def test_a_graph_that_is_given_runs_on_onnxruntimes_own(
    quantized_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registered: list[str] = []
    monkeypatch.setattr(
        ort.SessionOptions, "register_custom_ops_library", lambda _, path: registered.append(path)
    )
    bundle = open_bundle(quantized_bundle, check="sizes")
    OnnxRuntimeBackend(bundle, 1)
    assert registered == ([] if library() is None else [str(library())])
    registered.clear()
    OnnxRuntimeBackend(bundle, 1, graph=(quantized_bundle / "model.onnx").read_bytes())
    assert registered == []


@compiled
def test_the_environment_names_the_kernels() -> None:
    for name in KERNELS:
        with running(name):
            assert kernels() == name
            assert library() is not None
    with running(BUILT_IN):
        assert kernels() is None
        assert library() is None


@pytest.mark.parametrize("content", [None, b"not a library"], ids=["missing", "damaged"])
def test_without_a_library_nothing_is_registered(
    content: bytes | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = Path(native.__file__)
    shutil.copyfile(package, tmp_path / "__init__.py")
    if content is not None:
        (tmp_path / "_kernels.abi3.so").write_bytes(content)
    monkeypatch.setattr(native, "__file__", str(tmp_path / "__init__.py"))
    assert library() is None
    assert kernels() is None
