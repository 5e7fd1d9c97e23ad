"""The shipped model of the second generation without one of its features: the gate refuses what is left.

The graph passed before; the model is trained with a window, caps and a scale that it cannot do without.
"""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx.inliner
import pytest

from gemma_export.exporter.bundle import describe_files, write_manifest
from gemma_export.exporter.config import preset
from gemma_export.exporter.events import ignore
from gemma_export.exporter.parity.measure import measure_bundle
from gemma_export.exporter.parity.report import ParityReport
from gemma_export.exporter.pipeline import BuildResult
from gemma_export.runtime.bundle import Manifest

pytestmark = pytest.mark.slow

BUILDS = (("cpu", "fp32"), ("onnx", "fp32"), ("rtx", "fp16"), ("cuda", "fp16"), ("onnx", "int8"))
"""Targets and precisions: attention as one operator and in parts, in 32 bits and in 16, weights as codes."""
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


def fused(graph: Graph) -> list[onnx.NodeProto]:
    """Each layer's attention, where it is one operator."""
    return [node for node in graph.node if node.op_type == "GroupQueryAttention"]


def masked(graph: Graph, layer: int) -> list[onnx.NodeProto]:
    """The sums of a layer's scores and its mask, where attention is in parts."""
    name = f"layers.{layer}.self_attn.attention.masked."
    return [node for node in graph.node if node.name.startswith(name)]


def pairs() -> list[tuple[int, int]]:
    """A local layer and the one that sees everything after it."""
    return [(layer, layer + 1) for layer in range(0, CONFIG.num_layers, 2)]


def inverted_window(graph: Graph) -> None:
    nodes = fused(graph)
    for local, everything in pairs():
        if nodes:
            change(nodes[everything], "local_window_size", WINDOW)
            change(nodes[local], "local_window_size", None)
        for one, other in zip(masked(graph, local), masked(graph, everything), strict=True):
            one.input[1], other.input[1] = other.input[1], one.input[1]


def no_window(graph: Graph) -> None:
    nodes = fused(graph)
    for local, everything in pairs():
        if nodes:
            change(nodes[local], "local_window_size", None)
        for one, other in zip(masked(graph, local), masked(graph, everything), strict=True):
            one.input[1] = other.input[1]


def a_window_of_one_more(graph: Graph) -> None:
    nodes = fused(graph)
    for local, _ in pairs():
        if nodes:
            change(nodes[local], "local_window_size", WINDOW + 1)
    for node in graph.node:
        if node.op_type == "Greater":
            node.op_type = "GreaterOrEqual"


def no_attention_soft_cap(graph: Graph) -> None:
    for node in fused(graph):
        change(node, "softcap", None)
    for node in graph.node:
        if node.op_type == "Tanh" and "self_attn" in node.name:
            pass_on(node)


def no_final_soft_cap(graph: Graph) -> None:
    (tanh,) = [node for node in of_type(graph, "Tanh") if "self_attn" not in node.name]
    pass_on(tanh)


def the_scale_of_head_dim(graph: Graph) -> None:
    for node in fused(graph):
        change(node, "scale", CONFIG.head_dim**-0.5)
    for tensor in graph.initializer:
        if tensor.name == "cap_of_products":  # The cap over the scale.
            found = onnx.numpy_helper.to_array(tensor)
            other = np.asarray(found * (CONFIG.attention_scale / CONFIG.head_dim**-0.5), found.dtype)
            tensor.CopyFrom(onnx.numpy_helper.from_array(other, tensor.name))


def no_norm(which: str) -> Callable[[Graph], None]:
    def without(graph: Graph) -> None:
        (norm,) = [
            node for node in of_type(graph, "RMSNormalization") if node.output[0] == f"layers.1.{which}"
        ]
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


@pytest.fixture(params=BUILDS, ids="-".join)
def copy(request: pytest.FixtureRequest, build_once: BuildOnce, tmp_path: Path) -> Path:
    target, precision = request.param
    built = build_once(size="tiny2", target=target, precision=precision, parity="quick")
    assert built.manifest.parity.verdict == "pass"
    return Path(shutil.copytree(built.path, tmp_path / "copy"))


def measure_with(bundle: Path, changed: Callable[[Graph], None]) -> ParityReport:
    """Changes the graph, gives the bundle a manifest that fits it, and holds it against its checkpoint."""
    model = onnx.inliner.inline_local_functions(onnx.load(bundle / "model.onnx", load_external_data=False))
    changed(model.graph)
    onnx.save(model, bundle / "model.onnx")
    manifest = Manifest.from_json((bundle / "manifest.json").read_text())
    write_manifest(bundle, replace(manifest, files=describe_files(bundle, {})))
    return measure_bundle(
        bundle, checkpoint=None, reference="eager", text=None, level="quick", listener=ignore
    )


CASES = [
    pytest.param(build, changed, id=f"{'-'.join(build)}-{changed.__name__}")
    for build in BUILDS
    for changed in CHANGES
    # One token in 64 more is less than what 8 bits may cost.
    if (build[1], changed) != ("int8", a_window_of_one_more)
]


@pytest.mark.parametrize(("copy", "changed"), CASES, indirect=["copy"])
def test_a_graph_without_it_is_refused(changed: Callable[[Graph], None], copy: Path) -> None:
    report = measure_with(copy, changed)
    assert report.verdict == "fail"
    assert report.reasons


def test_a_graph_that_has_it_all_passes(copy: Path) -> None:
    assert measure_with(copy, lambda graph: None).verdict == "pass"
