"""From a checkpoint to a bundle that has proved itself."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gemma_export.errors import CheckpointError, ParityError
from gemma_export.exporter import events, pipeline
from gemma_export.exporter.config import tiny_folder
from gemma_export.exporter.pipeline import build
from gemma_export.exporter.request import BuildRequest
from gemma_export.runtime.bundle import Manifest, TensorSpec, open_bundle
from gemma_export.runtime.session import load

STAGES = ["checkpoint", "tokenizer", "trace", "passes", "weights"]


def manifest_of(bundle: Path) -> Manifest:
    return open_bundle(bundle).manifest


def test_manifest_describes_the_model(tiny_bundle: Path) -> None:
    manifest = manifest_of(tiny_bundle)
    assert (manifest.model.name, manifest.model.size) == (
        "gemma-tiny",
        "tiny",
    )
    assert (manifest.precision, manifest.target, manifest.scheme) == ("fp32", "cpu", "fp32")
    assert manifest.fp32_tensors == ()
    assert manifest.tokens.stop == (1, 107)
    assert manifest.checkpoint.source == str(tiny_folder())
    assert (manifest.parity.verdict, manifest.parity.level) == ("pass", "quick")
    assert manifest.graph.passes["fuse_rms_norm"] == 2 * manifest.model.num_layers + 1


def test_manifest_describes_the_graph(tiny_bundle: Path) -> None:
    manifest = manifest_of(tiny_bundle)
    inputs, outputs = manifest.graph.inputs, manifest.graph.outputs
    cache = ("batch", 1, 512, 128)
    assert inputs[:3] == (
        TensorSpec("input_ids", "int64", ("batch", "tokens")),
        TensorSpec("position_ids", "int64", ("batch", "tokens")),
        TensorSpec("past_key_values.0.key", "float32", cache),
    )
    assert outputs[:2] == (
        TensorSpec("logits", "float32", ("batch", 1, 2048)),
        TensorSpec("present.0.key", "float32", cache),
    )
    assert inputs[-1] == TensorSpec("tail_start", "int64", (1,))
    assert outputs[-1] == TensorSpec("tail_logits", "float32", ("batch", "tail", 2048))
    assert len(inputs) == 2 + 2 * manifest.model.num_layers + 1
    assert len(outputs) == 1 + 2 * manifest.model.num_layers + 1
    assert manifest.graph.passes["add_tail_logits"] == 1


def test_manifest_counts_bytes(tiny_bundle: Path) -> None:
    manifest = manifest_of(tiny_bundle)
    parameters = manifest.model.parameters.embedding + manifest.model.parameters.other
    rotary = 2 * 512 * 64 * 4  # cosines and sines of 512 positions and half a head
    # Beyond the weights there are a few constants.
    assert 0 <= manifest.bytes.weights - rotary - 4 * parameters < 1024
    assert manifest.bytes.per_token == manifest.bytes.weights - rotary
    assert manifest.bytes.cache_per_row == 2 * 5 * 512 * 128 * 4


def test_logits_of_all_tokens(tiny_bundle_all: Path) -> None:
    manifest = manifest_of(tiny_bundle_all)
    assert (manifest.graph.logits, manifest.graph.max_length) == ("all", 64)
    assert manifest.graph.outputs[0].shape == ("batch", "tokens", 2048)
    assert manifest.parity.verdict == "not run"
    assert not (tiny_bundle_all / "parity.json").exists()


def test_both_bundles_say_the_same(tiny_bundle: Path, tiny_bundle_all: Path) -> None:
    texts = [
        str(load(bundle, threads=1).generate("Once upon a time", max_new_tokens=24))
        for bundle in (tiny_bundle, tiny_bundle_all)
    ]
    assert texts[0] == texts[1]
    assert len(texts[0]) > 20


@pytest.mark.usefixtures("traced_once")
def test_stages_are_told_in_order(tmp_path: Path) -> None:
    told: list[events.Event] = []
    result = build(BuildRequest(size="tiny", output=tmp_path / "b", parity="none"), told.append)
    assert [event.stage for event in told if isinstance(event, events.StageStarted)] == STAGES
    assert [event.stage for event in told if isinstance(event, events.StageFinished)] == STAGES
    progress = [event for event in told if isinstance(event, events.StageProgress)]
    assert {(event.stage, event.unit) for event in progress} == {("weights", "bytes")}
    assert progress[-1].done == progress[-1].total
    assert result.path == tmp_path / "b"
    assert result.manifest == manifest_of(tmp_path / "b")
    assert result.report is None


@pytest.mark.usefixtures("traced_once")
def test_default_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = build(BuildRequest(size="tiny", precision="bf16", parity="none"))
    assert result.path == Path("bundles/gemma-tiny-bf16-cpu")
    manifest = manifest_of(result.path)
    assert (manifest.storage_dtype, manifest.compute_dtype) == ("bfloat16", "float32")


@pytest.mark.usefixtures("traced_once")
def test_random_weights_are_repeatable(tmp_path: Path) -> None:
    def digests(name: str, seed: int) -> tuple[str, str]:
        request = BuildRequest(
            size="tiny", random_weights=True, seed=seed, output=tmp_path / name, parity="none"
        )
        manifest = build(request).manifest
        return manifest.checkpoint.digest, manifest.files["model.onnx.data"].sha256

    first, again, other = digests("first", 1), digests("again", 1), digests("other", 2)
    assert first == again
    assert all(one != two for one, two in zip(first, other, strict=True))


def failing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the gate find a fault; it measures the first bundle only."""
    measure: Callable[..., Any] = pipeline.measure_parity
    reports: list[Any] = []

    def fail(*arguments: Any, **options: Any) -> Any:
        reports.extend([] if reports else [measure(*arguments, **options)])
        return replace(reports[0], verdict="fail", reasons=("the KL is 9",))

    monkeypatch.setattr(pipeline, "measure_parity", fail)


@pytest.mark.usefixtures("traced_once")
def test_bundle_outside_its_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch)
    output = tmp_path / "b"
    request = BuildRequest(size="tiny", output=output)
    with pytest.raises(ParityError, match=r"does not say what its reference says: the KL is 9\."):
        build(request)
    assert list(tmp_path.iterdir()) == []
    build(replace(request, allow_parity_failure=True))
    parity = manifest_of(output).parity
    assert (parity.verdict, parity.allowed_failure) == ("fail", True)


def test_tokenizer_is_refused_before_anything_is_traced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "trace", lambda *arguments, **options: pytest.fail("traced"))
    (tmp_path / "tokenizer.model").write_bytes(b"no tokenizer")
    request = BuildRequest(size="tiny", output=tmp_path / "b", tokenizer=tmp_path / "tokenizer.model")
    with pytest.raises(CheckpointError, match=r"tokenizer\.model"):
        build(request)
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.model"]
