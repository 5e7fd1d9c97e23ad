"""The model that ships, compiled by the real TensorRT for RTX: whole, in every precision for every device."""

import sys
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import tensorrt_rtx
from support.engine_graphs import SLOTS, Written
from support.fake_device import FakeCudart

from gemma_export.errors import EngineError, MissingDependencyError, UsageError
from gemma_export.exporter import events
from gemma_export.exporter.engines import build as compiling
from gemma_export.exporter.engines import modules
from gemma_export.exporter.engines.build import build_engines
from gemma_export.exporter.engines.options import EngineOptions
from gemma_export.exporter.engines.request import EngineRequest, engine_files, plans_of
from gemma_export.exporter.pipeline import build
from gemma_export.exporter.request import BuildRequest
from gemma_export.runtime.manifest import Range

EngineGraphs = Callable[..., Written]


@pytest.mark.parametrize(
    ("precision", "scheme"),
    [("fp16", "fp16"), ("bf16", "bf16"), ("int8", "w8a16"), ("int4", "w4a16")],
    ids=lambda name: name,
)
def test_the_whole_model_compiles_in_every_precision_for_every_device(
    traced_once: None, tmp_path: Path, precision: str, scheme: str
) -> None:
    """Each plan has passed its audit: a build whose plan does not ends with an error and no bundle."""
    request = BuildRequest(
        size="tiny",
        target="rtx",
        precision=precision,
        scheme_name=scheme,
        no_calibration=precision.startswith("int"),
        max_length=SLOTS,
        parity="none",
        output=tmp_path / "bundle",
    )
    plans = ((75,), (86, 89, 120)) if precision in ("fp16", "int8") else ((86, 89, 120),)
    if (75,) not in plans:
        with pytest.raises(UsageError, match=f"SM 75 does not run {precision}"):
            replace(request, engines=EngineOptions(sms=(75, 86, 89, 120)))
    options = EngineOptions(sms=tuple(sm for plan in plans for sm in plan), max_batch=4)
    manifest = build(replace(request, engines=options)).manifest
    layers = manifest.model.num_layers
    assert [engine.sms for engine in manifest.engines] == list(plans)
    for engine in manifest.engines:
        assert manifest.files[engine.file].size > engine.weight_bytes
        assert engine.version == tensorrt_rtx.__version__
        assert engine.kernels["gemm_mha_v2"] == layers
        assert engine.kernels["gemv_mha_v1"] == 2 * layers
        assert [(p.name, p.batch, p.tokens) for p in engine.profiles] == [
            ("prefill", Range(1, 1, 1), Range(1, SLOTS, SLOTS)),
            ("decode", Range(1, 1, 1), Range(1, 1, 1)),
            ("decode-batch", Range(2, 4, 4), Range(1, 1, 1)),
        ]
        assert all(profile.activation_bytes > 0 for profile in engine.profiles)
    # What is compiled for SM 75 is the graph that is beside it, and that parity is measured on.
    assert manifest.graph.passes.get("keep_codes", 0) == (layers if scheme == "w8a16" else 0)


def test_products_of_integers_compile_where_they_are_asked_for(
    engine_graph: EngineGraphs, tmp_path: Path
) -> None:
    engines = engine_graph("w8a8", sms=(75, 89)).build(tmp_path, 75, 89)
    assert [engine.sms for engine in engines] == [(75,), (89,)]
    assert sorted(path.name for path in (tmp_path / "engines").iterdir()) == sorted(
        Path(engine.file).name for engine in engines
    )


@pytest.mark.parametrize(
    ("scheme", "sentence"),
    [
        ("bf16", "SM 75 does not run bf16"),
        ("w4a16", "SM 75 does not run int4"),
        ("w8a16", r"SM 75 would make 16-bit numbers of all codes of layers\.0\.self_attn\.o_proj\.codes"),
    ],
)
def test_a_graph_that_sm_75_does_not_run_is_refused(
    engine_graph: EngineGraphs, tmp_path: Path, scheme: str, sentence: str
) -> None:
    with pytest.raises(UsageError, match=sentence):
        engine_graph(scheme).build(tmp_path, 75, 89)
    assert not (tmp_path / "engines").exists()


def test_a_graph_for_sm_75_has_it_for_a_reason(
    engine_graph: EngineGraphs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the refusal the audit finds what the pass `keep_codes` is there for."""
    monkeypatch.setattr(compiling, "check_codes", lambda sms, uses: None)
    with pytest.raises(EngineError, match="Int8 is expanded to 16 bits in memory on every call"):
        engine_graph("w8a16").build(tmp_path, 75)
    engine_graph("w8a16", sms=(75,)).build(tmp_path, 75)


def test_progress_is_told_in_percent(engine_graph: EngineGraphs, tmp_path: Path) -> None:
    heard: list[events.Event] = []
    engine_graph("w8a16").build(tmp_path, 89, listener=heard.append)
    assert isinstance(heard[0], events.StageStarted)
    steps = [event for event in heard if isinstance(event, events.StageProgress)]
    done = [step.done for step in steps]
    assert done == sorted(set(done))
    assert len(done) > 5
    assert done[-1] == 100
    assert {(step.stage, step.total, step.unit) for step in steps} == {("engine", 100, "percent")}
    assert isinstance(heard[-1], events.StageFinished)
    assert heard[-1].facts["sm"] == "89"


def test_plans_are_shared_by_what_compiles_alike() -> None:
    assert plans_of(EngineRequest("rtx", (120, 75, 89))) == ((75,), (89, 120))
    assert plans_of(EngineRequest("rtx")) == ((80, 86, 89, 120, 121),)
    assert engine_files(EngineRequest("rtx", (75,))) == 1
    assert engine_files(EngineRequest("rtx", (75, 80))) == 2
    assert engine_files(EngineRequest("tensorrt")) == 1


@pytest.mark.parametrize(
    ("request_", "sentence"),
    [
        (lambda: EngineRequest("rtx", (87,)), "does not compile for SM 87"),
        (lambda: EngineRequest("tensorrt", (89,)), "for the GPU of the machine"),
        (lambda: EngineRequest("rtx", (89,), 0), "A batch of 0"),
        (lambda: EngineRequest("rtx", (89,), 1, 0), "A prefill chunk of 0"),
        (lambda: EngineRequest("cuda"), "Nothing compiles for cuda"),  # type: ignore[arg-type]
    ],
    ids=["unknown SM", "SM of tensorrt", "no batch", "no chunk", "no flavour"],
)
def test_an_impossible_request_is_refused(request_: Callable[[], object], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        request_()


def test_a_chunk_beyond_the_cache_is_refused(engine_graph: EngineGraphs, tmp_path: Path) -> None:
    graph = engine_graph("fp16")
    request = EngineRequest("rtx", (89,), prefill_chunk=SLOTS + 1)
    with pytest.raises(UsageError, match=f"{SLOTS + 1} tokens is more than the cache's {SLOTS}"):
        build_engines(graph.file, graph.layers, graph.weights, request, tmp_path)


def test_tensorrt_that_is_missing_is_told_with_what_works_instead(
    engine_graph: EngineGraphs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    graph = engine_graph("fp16")
    with pytest.raises(MissingDependencyError, match="TensorRT is not installed") as caught:
        build_engines(graph.file, graph.layers, graph.weights, EngineRequest("tensorrt", (), 1, 8), tmp_path)
    hint = caught.value.hint
    assert "gemma-export[gpu]" in hint
    assert "--target rtx" in hint
    assert "--target onnx" in hint
    assert "trtexec --onnx=model.onnx" in hint
    assert "--maxShapes=input_ids:1x8,position_ids:1x8,past_key_values.0.key:1x1x64x128" in hint


def test_tensorrt_for_rtx_that_is_missing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(MissingDependencyError, match="TensorRT for RTX is not installed") as caught:
        modules.load_compiler("rtx")
    assert "gemma-export[rtx]" in caught.value.hint


def test_a_tensorrt_that_updates_no_cache_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    old = type(sys)("tensorrt")
    old.__version__ = "10.3.0"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tensorrt", old)
    with pytest.raises(MissingDependencyError, match=r"TensorRT 10\.3\.0 .* cannot update a cache") as caught:
        modules.load_compiler("tensorrt")
    assert modules.CACHE_UPDATES in caught.value.hint


def test_tensorrt_compiles_for_the_gpu_at_hand(
    engine_graph: EngineGraphs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same API under the other name; without compute capabilities, which TensorRT does not take."""
    monkeypatch.setitem(sys.modules, "tensorrt", tensorrt_rtx)
    monkeypatch.setattr(modules, "load_cudart", lambda extra: FakeCudart(sm=87))
    graph = engine_graph("fp16")
    request = EngineRequest("tensorrt", prefill_chunk=8)
    (engine,) = build_engines(graph.file, graph.layers, graph.weights, request, tmp_path)
    assert (engine.flavour, engine.sms, engine.file) == ("tensorrt", (87,), "engines/tensorrt-sm87.engine")


def test_tensorrt_without_a_gpu_is_a_sentence(
    engine_graph: EngineGraphs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", tensorrt_rtx)
    monkeypatch.setattr(modules, "load_cudart", lambda extra: FakeCudart(driver=0))
    graph = engine_graph("fp16")
    with pytest.raises(EngineError, match="for the GPU of the machine it runs on") as caught:
        build_engines(graph.file, graph.layers, graph.weights, EngineRequest("tensorrt", (), 1, 8), tmp_path)
    assert "--target rtx" in caught.value.hint


def test_the_extra_asks_for_a_version_that_updates_caches() -> None:
    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text(encoding="utf-8"))
    assert f"tensorrt>={modules.CACHE_UPDATES}" in project["project"]["optional-dependencies"]["gpu"]
