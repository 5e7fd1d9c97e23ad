"""The shipped model of the second generation without one of its features: the gate refuses what is left.

The graph passed before; the model is trained with a window, caps and a scale that it cannot do without.
"""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import onnx
import pytest

from gemma_export.exporter.bundle import describe_files, write_manifest
from gemma_export.exporter.config import preset
from gemma_export.exporter.events import ignore
from gemma_export.exporter.parity.measure import measure_bundle
from gemma_export.exporter.parity.report import ParityReport
from gemma_export.exporter.pipeline import BuildResult
from gemma_export.runtime.bundle import Manifest

pytestmark = pytest.mark.slow

TARGETS = ("cpu", "onnx")
CONFIG = preset("tiny2")
WINDOW = CONFIG.sliding_window

BuildOnce = Callable[..., BuildResult]
Graph = onnx.GraphProto


def of_type(graph: Graph, op_type: str) -> list[onnx.NodeProto]:
    found = [node for node in graph.node if node.op_type == op_type]
    assert found
    return found


def change(node: onnx.NodeProto, name: str, value: float | None) -> None:
    """Sets an attribute, or removes it for None."""
    kept = [attribute for attribute in node.attribute if attribute.name != name]
    del node.attribute[:]
    node.attribute.extend(kept)
    if value is not None:
        node.attribute.append(onnx.helper.make_attribute(name, value))


def pass_on(node: onnx.NodeProto) -> None:
    """What comes in goes out."""
    node.op_type = "Identity"
    del node.input[1:]
    del node.attribute[:]


def attention(graph: Graph) -> list[onnx.NodeProto]:
    return [node for node in graph.node if node.op_type in ("GroupQueryAttention", "Attention")]


def pairs(graph: Graph) -> list[tuple[onnx.NodeProto, onnx.NodeProto]]:
    """The attention of a local layer and of the one that sees everything after it."""
    found = attention(graph)
    return list(zip(found[::2], found[1::2], strict=True))


def inverted_window(graph: Graph) -> None:
    for local, everything in pairs(graph):
        if local.op_type == "Attention":
            local.input[3], everything.input[3] = everything.input[3], local.input[3]
        else:
            change(everything, "local_window_size", WINDOW)
            change(local, "local_window_size", None)


def no_window(graph: Graph) -> None:
    for local, everything in pairs(graph):
        if local.op_type == "Attention":
            local.input[3] = everything.input[3]
        else:
            change(local, "local_window_size", None)


def a_window_of_one_more(graph: Graph) -> None:
    for local, _ in pairs(graph):
        if local.op_type == "GroupQueryAttention":
            change(local, "local_window_size", WINDOW + 1)
    for node in graph.node:
        if node.op_type == "Greater":
            node.op_type = "GreaterOrEqual"


def no_attention_soft_cap(graph: Graph) -> None:
    for node in attention(graph):
        change(node, "softcap", None)


def no_final_soft_cap(graph: Graph) -> None:
    (tanh,) = of_type(graph, "Tanh")
    pass_on(tanh)


def the_scale_of_head_dim(graph: Graph) -> None:
    for node in attention(graph):
        change(node, "scale", CONFIG.head_dim**-0.5)


def no_norm(which: str) -> Callable[[Graph], None]:
    def without(graph: Graph) -> None:
        (norm,) = [node for node in of_type(graph, "RMSNormalization") if node.name == f"layers.1.{which}"]
        pass_on(norm)

    without.__name__ = f"no_{which}"
    return without


CHANGES = [
    inverted_window,
    no_window,
    a_window_of_one_more,
    no_attention_soft_cap,
    no_final_soft_cap,
    the_scale_of_head_dim,
    no_norm("input_layernorm"),
    no_norm("post_attention_layernorm"),
    no_norm("pre_feedforward_layernorm"),
    no_norm("post_feedforward_layernorm"),
]


@pytest.fixture(params=TARGETS)
def copy(request: pytest.FixtureRequest, build_once: BuildOnce, tmp_path: Path) -> Path:
    built = build_once(size="tiny2", target=request.param, parity="quick")
    assert built.manifest.parity.verdict == "pass"
    return Path(shutil.copytree(built.path, tmp_path / "copy"))


def measure_with(bundle: Path, changed: Callable[[Graph], None]) -> ParityReport:
    """Changes the graph, gives the bundle a manifest that fits it, and holds it against its checkpoint."""
    model = onnx.load(bundle / "model.onnx", load_external_data=False)
    changed(model.graph)
    onnx.save(model, bundle / "model.onnx")
    manifest = Manifest.from_json((bundle / "manifest.json").read_text())
    write_manifest(bundle, replace(manifest, files=describe_files(bundle, {})))
    return measure_bundle(
        bundle, checkpoint=None, reference="eager", text=None, level="quick", listener=ignore
    )


@pytest.mark.parametrize("changed", CHANGES, ids=lambda changed: changed.__name__)
def test_a_graph_without_it_is_refused(changed: Callable[[Graph], None], copy: Path) -> None:
    report = measure_with(copy, changed)
    assert report.verdict == "fail"
    assert report.reasons


def test_a_graph_that_has_it_all_passes(copy: Path) -> None:
    assert measure_with(copy, lambda graph: None).verdict == "pass"
