"""Engines for a finished bundle: all of them and a new manifest, or the bundle as it was."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.command_line import Outcome, assert_refused
from support.damage import flip_byte

from gemma_export.errors import EngineError, GemmaExportError, MissingDependencyError, UsageError
from gemma_export.exporter import compile as compiling
from gemma_export.exporter import pipeline
from gemma_export.exporter.compile import compile_bundle
from gemma_export.exporter.config import preset
from gemma_export.exporter.engines import build, preflight
from gemma_export.exporter.engines.budget import MemoryPlan
from gemma_export.exporter.engines.options import EngineOptions
from gemma_export.exporter.events import Event, StageFinished
from gemma_export.exporter.request import BuildRequest
from gemma_export.exporter.schemes import scheme_for
from gemma_export.runtime.archive import pack, unpack
from gemma_export.runtime.bundle import MANIFEST_NAME, open_bundle
from gemma_export.runtime.manifest import EngineInfo

pytest.importorskip("tensorrt_rtx")

ADA = EngineOptions(sms=(89,))


@pytest.fixture(scope="session")
def onnx_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped model in fp16 for `onnx`, with 256 slots, not measured. Read only: copy it to change it."""
    request = BuildRequest(
        size="tiny",
        target="onnx",
        precision="fp16",
        max_length=256,
        parity="none",
        output=tmp_path_factory.mktemp("onnx") / "bundle",
    )
    return pipeline.build(request).path


@pytest.fixture(scope="session")
def compiled(onnx_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with an engine for SM 89. Read only."""
    return compile_bundle(onnx_bundle, "rtx", ADA, tmp_path_factory.mktemp("rtx") / "bundle").path


@pytest.fixture
def bundle(onnx_bundle: Path, tmp_path: Path) -> Path:
    """A copy, to be compiled or damaged."""
    return Path(shutil.copytree(onnx_bundle, tmp_path / "bundle"))


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def stays_as_it_was(bundle: Path, error: type[GemmaExportError], compile_it: Callable[[], object]) -> str:
    before = contents(bundle)
    with pytest.raises(error) as refused:
        compile_it()
    assert contents(bundle) == before
    assert [path.name for path in bundle.parent.iterdir()] == [bundle.name]
    return refused.value.message


def engine(name: str, *sms: int) -> EngineInfo:
    return EngineInfo(f"engines/{name}.engine", "rtx", "1.7", sms, (), 1, {})


def writing(monkeypatch: pytest.MonkeyPatch, *engines: EngineInfo) -> None:
    """Lets the builder write these in no time: what it writes is not what is being tested."""

    def build_engines(graph: Path, *arguments: Any) -> tuple[EngineInfo, ...]:
        folder = graph.parent / "engines"
        folder.mkdir(exist_ok=True)
        for info in engines:
            (graph.parent / info.file).write_text(f"new {info.file}")
        return engines

    monkeypatch.setattr(build, "build_engines", build_engines)


# With a real engine


def test_bundle_has_its_engines(onnx_bundle: Path, compiled: Path) -> None:
    old, new = open_bundle(onnx_bundle).manifest, open_bundle(compiled).manifest
    (info,) = new.engines
    assert (info.flavour, info.sms) == ("rtx", (89,))
    assert [profile.name for profile in info.profiles] == ["prefill", "decode"]
    assert new.files[info.file].size > info.weight_bytes
    # Weights are stored once: what the engine has more than the graph are its constants.
    assert info.weight_bytes == pytest.approx(old.bytes.weights, rel=0.02)
    assert {name: new.files[name] for name in old.files} == dict(old.files)
    assert (new.target, new.graph, new.parity) == ("rtx", old.graph, old.parity)
    assert contents(compiled) | contents(onnx_bundle) != contents(compiled)  # The manifest is another.


def test_inspect_shows_the_engines_audit(compiled: Path, invoke: Callable[..., Outcome]) -> None:
    shown = invoke(["inspect", compiled]).out
    info = open_bundle(compiled).manifest.engines[0]
    assert f"TensorRT for RTX {info.version}, for SM 89" in shown
    assert all(kind in shown for kind in info.kernels)
    assert "1 row of 1 to 256 tokens, activations" in shown
    assert "0.62 MiB for 1 row of 256 tokens" in shown  # 2 · 5 layers · 1 head · 256 · 128 · 2 bytes
    fitting = next(line for line in shown.splitlines() if line.startswith("fits on"))
    assert "rtx-4060" in fitting
    assert "orin" not in fitting


def test_activations_are_about_what_was_estimated(compiled: Path) -> None:
    (info,) = open_bundle(compiled).manifest.engines
    plan = MemoryPlan(preset("tiny"), "rtx", "fp16", scheme_for("rtx", "fp16"), 256, 1, 256)
    measured = max(profile.activation_bytes for profile in info.profiles)
    # Kernels decide what lives at once: a tenth is what the estimate may be off by.
    assert plan.activations == pytest.approx(measured, rel=0.1)


def test_engines_travel_without_the_graph(compiled: Path, tmp_path: Path) -> None:
    whole = pack(compiled, tmp_path / "whole.tar")
    size = pack(compiled, tmp_path / "engines.tar", engines_only=True)
    manifest = open_bundle(compiled).manifest
    assert whole - size >= manifest.files["model.onnx.data"].size
    folder = tmp_path / "folder"
    folder.mkdir()
    unpack(tmp_path / "engines.tar", folder)
    assert open_bundle(folder).manifest.engines == manifest.engines
    with pytest.raises(UsageError, match="no graph to compile"):
        compile_bundle(folder, "rtx", ADA)


def test_build_compiles_after_the_weights_and_before_parity(tmp_path: Path) -> None:
    told: list[Event] = []
    request = BuildRequest(
        size="tiny",
        target="rtx",
        precision="int8",
        no_calibration=True,
        max_length=64,
        engines=ADA,
        output=tmp_path / "b",
    )
    result = pipeline.build(request, told.append)
    stages = [event.stage for event in told if isinstance(event, StageFinished)]
    assert stages.index("audit") < stages.index("engine") < stages.index("parity")
    manifest = open_bundle(tmp_path / "b").manifest
    assert manifest == result.manifest
    assert [info.sms for info in manifest.engines] == [(89,)]
    assert manifest.parity.verdict == "pass"


# What becomes of the bundle


def test_bundle_gets_engines_in_place(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (bundle / "notes.txt").write_text("not of the bundle")
    writing(monkeypatch, engine("rtx-sm89", 89))
    before = contents(bundle)
    compile_bundle(bundle, "rtx", ADA)
    after = contents(bundle)
    assert after.pop("engines/rtx-sm89.engine") == b"new engines/rtx-sm89.engine"
    assert after.pop(MANIFEST_NAME) != before.pop(MANIFEST_NAME)
    assert after == before
    assert open_bundle(bundle).extra == ("notes.txt",)
    assert [path.name for path in bundle.parent.iterdir()] == [bundle.name]


def test_engines_of_other_gpus_stay_and_those_of_the_same_go(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writing(monkeypatch, engine("a", 86), engine("b", 89, 120))
    compile_bundle(bundle, "rtx", ADA)
    writing(monkeypatch, engine("c", 120, 121))
    compile_bundle(bundle, "rtx", ADA)
    manifest = open_bundle(bundle).manifest
    assert [info.file for info in manifest.engines] == ["engines/c.engine", "engines/a.engine"]
    assert sorted(path.name for path in (bundle / "engines").iterdir()) == ["a.engine", "c.engine"]


def test_engine_is_never_written_into_the_old_bundles_file(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writing(monkeypatch, engine("a", 89))
    compile_bundle(bundle, "rtx", ADA)
    monkeypatch.setattr(compiling, "write_manifest", _fail)

    def build_engines(graph: Path, *arguments: Any) -> tuple[EngineInfo, ...]:
        (graph.parent / "engines").mkdir(exist_ok=True)
        (graph.parent / "engines/a.engine").write_text("half")
        return (engine("a", 89),)

    monkeypatch.setattr(build, "build_engines", build_engines)
    stays_as_it_was(bundle, EngineError, lambda: compile_bundle(bundle, "rtx", ADA))


@pytest.mark.parametrize("block", [32, 128])
def test_the_blocks_of_a_bundle_are_those_of_the_estimate(
    block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = BuildRequest(
        size="tiny",
        target="onnx",
        precision="int4",
        block=block,
        max_length=64,
        no_calibration=True,
        parity="none",
        output=tmp_path / "bundle",
    )
    plans: list[MemoryPlan] = []

    def seen(plan: MemoryPlan, *device: object) -> None:
        plans.append(plan)
        raise UsageError("Enough.", "Nothing is compiled.")

    monkeypatch.setattr(compiling, "check_memory", seen)
    with pytest.raises(UsageError, match="Enough"):
        compile_bundle(pipeline.build(request).path, "rtx", ADA)
    assert [plan.block for plan in plans] == [block]


def _fail(*arguments: object, **options: object) -> None:
    raise EngineError("It failed.", "Try again.")


def test_failed_build_leaves_the_bundle_alone(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "build_engines", _fail)
    stays_as_it_was(bundle, EngineError, lambda: compile_bundle(bundle, "rtx", ADA))
    with pytest.raises(EngineError):
        compile_bundle(bundle, "rtx", ADA, bundle.with_name("new"))
    assert not bundle.with_name("new").exists()


# What is refused


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data"])
def test_graph_that_was_edited_after_the_build(name: str, bundle: Path) -> None:
    flip_byte(bundle / name, (bundle / name).stat().st_size // 2)
    message = stays_as_it_was(bundle, GemmaExportError, lambda: compile_bundle(bundle, "rtx", ADA))
    assert f"{name} has been changed" in message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sms": (87,)}, "does not compile for SM 87"),
        ({"prefill_chunk": 257}, "--prefill-chunk 257 is more than the 256 tokens"),
        ({"device": "orin-nano-8gb"}, "orin-nano-8gb, which is SM 87"),
        ({"memory": 1 << 20}, "gemma-tiny in fp16 needs"),
    ],
    ids=str,
)
def test_impossible_engines(options: dict[str, Any], message: str, bundle: Path) -> None:
    said = stays_as_it_was(
        bundle, UsageError, lambda: compile_bundle(bundle, "rtx", EngineOptions(**options))
    )
    assert message in said


def test_machine_without_tensorrt_is_told_what_works(
    bundle: Path, invoke: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(flavour: str, command: str | None) -> None:
        raise MissingDependencyError("TensorRT is not installed.", f"Or there: {command}")

    monkeypatch.setattr(preflight, "load_compiler", missing)
    outcome = invoke(["compile", bundle, "--target", "tensorrt", "--max-batch", "3", "-q"])
    assert_refused(outcome, 1, "TensorRT is not installed")
    assert f"trtexec --onnx={bundle / 'model.onnx'}" in outcome.err
    assert "input_ids:1x256" in outcome.err  # prefill
    assert "past_key_values.4.value:3x1x256x128" in outcome.err  # decode of three rows


def test_machine_without_a_gpu_is_told_what_works(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "load_compiler", lambda *arguments: None)
    monkeypatch.setattr(preflight, "device_sm", _fail)
    with pytest.raises(EngineError) as refused:
        compile_bundle(bundle, "tensorrt", EngineOptions())
    assert "trtexec --onnx=" in refused.value.hint
