"""Spellings that TensorRT compiles without a word, or refuses with others: the audit finds each of them."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from support.engine_graphs import SLOTS, Written, write_engine_graph

from gemma_export.errors import EngineError
from gemma_export.exporter.engines.engine_graph import EngineGraph, WeightUse, read_graph
from gemma_export.exporter.engines.plan import Kernel, PlanTensor, PlanText, read_plan
from gemma_export.exporter.engines.plan_audit import audit_plan, require_clean
from gemma_export.exporter.engines.profiles import Profile
from gemma_export.runtime.manifest import Range

EngineGraphs = Callable[..., Written]


def nodes(graph: ir.Graph, op_type: str, part: str = "") -> list[ir.Node]:
    return [node for node in graph if node.op_type == op_type and part in str(node.name)]


def maker(value: ir.Value | None) -> ir.Node:
    assert value is not None
    node = value.producer()
    assert node is not None
    return node


def constant(graph: ir.Graph, name: str, values: np.ndarray) -> ir.Value:
    value = ir.Value(name=name, const_value=ir.tensor(values, name=name))
    value.shape, value.dtype = ir.Shape(values.shape), ir.DataType.from_numpy(values.dtype)
    graph.register_initializer(value)
    return value


def insert(graph: ir.Graph, before: ir.Node, position: int, op_type: str, **attributes: object) -> ir.Node:
    """Puts an operator between a node and one of its inputs."""
    node = ir.node(op_type, [before.inputs[position]], attributes=attributes)
    node.name = node.outputs[0].name = f"{before.name}.{op_type}"
    graph.insert_before(before, node)
    before.replace_input_with(position, node.outputs[0])
    return node


def stored(value: ir.Value | None) -> np.ndarray:
    """The numbers of the initializer behind a value."""
    while value is not None and not value.is_initializer():
        value = maker(value).inputs[0]
    assert value is not None
    assert value.const_value is not None
    return value.const_value.numpy()


def causal_by_attribute(graph: ir.Graph) -> None:
    for node in nodes(graph, "Attention"):
        node.resize_inputs(3)
        node.attributes["is_causal"] = ir.AttrInt64("is_causal", 1)


def length_of_the_cache(graph: ir.Graph) -> None:
    causal_by_attribute(graph)
    length = ir.Value(name="length", shape=ir.Shape(["B"]), type=ir.TensorType(ir.DataType.INT64))
    graph.inputs.append(length)
    for node in nodes(graph, "Attention"):
        node.resize_inputs(7)
        node.replace_input_with(6, length)


def identity_before_the_output(graph: ir.Graph, *casts: ir.DataType) -> None:
    for index, output in enumerate(graph.outputs):
        if index == 0:
            continue
        name, scatter = output.name, maker(output)
        output.name = f"{name}.written"
        value = output
        for number, dtype in enumerate(casts or (None,)):
            operator = "Identity" if dtype is None else "Cast"
            attributes = {} if dtype is None else {"to": dtype.value}
            node = ir.node(operator, [value], attributes=attributes, name=f"{name}.{operator}.{number}")
            graph.append(node)
            value = node.outputs[0]
        value.name, value.shape, value.dtype = name, output.shape, output.dtype
        assert scatter.outputs[0] is output
        graph.outputs[index] = value


def casts_before_the_output(graph: ir.Graph) -> None:
    identity_before_the_output(graph, ir.DataType.FLOAT, ir.DataType.FLOAT16)


def identity_behind_the_input(graph: ir.Graph) -> None:
    for node in nodes(graph, "TensorScatter"):
        insert(graph, node, 0, "Identity")


def scale_per_row(graph: ir.Graph) -> None:
    """The row's scale in DequantizeLinear, where it usually is, and not behind the product."""
    for node in nodes(graph, "DequantizeLinear", "_proj.numbers"):
        rows = stored(node.inputs[0]).shape[0]
        scales = constant(graph, f"{node.name}.rows", np.full(rows, 2.0**-9, np.float16))
        node.replace_input_with(1, scales)
        node.attributes["axis"] = ir.AttrInt64("axis", 0)


def head_from_the_left(graph: ir.Graph) -> None:
    """logits = (E · xᵀ)ᵀ."""
    head = next(node for node in nodes(graph, "MatMul") if "_proj" not in str(node.name))
    table = maker(head.inputs[1]).inputs[0]
    turned = ir.node("Transpose", [head.inputs[0]], {"perm": [0, 2, 1]})
    product = ir.node("MatMul", [table, turned.outputs[0]], name="head")
    back = ir.node("Transpose", [product.outputs[0]], {"perm": [0, 2, 1]})
    turned.name, back.name = "head.x", "head.back"
    graph.insert_before(head, [turned, product, back])
    head.outputs[0].replace_all_uses_with(back.outputs[0])
    graph.remove(head, safe=True)


def second_table(graph: ir.Graph) -> None:
    lookup = next(node for node in nodes(graph, "Gather") if len(stored(node.inputs[0]).shape) == 2)
    lookup.replace_input_with(0, constant(graph, "second_table", stored(lookup.inputs[0]).copy()))


REFUSED = {
    "is_causal": ("fp16", causal_by_attribute, "masks as if its first query stood at the cache's first slot"),
    "nonpad_kv_seqlen": ("fp16", length_of_the_cache, "takes no notice of the input length"),
    "Identity before the output": (
        "fp16",
        identity_before_the_output,
        "is not the cache's output: something stands between",
    ),
    "Casts before the output": ("fp16", casts_before_the_output, "is not the cache's output"),
    "Identity behind the input": ("fp16", identity_behind_the_input, "writes into a copy of the cache"),
    "a scale per row": (
        "w8a16",
        scale_per_row,
        "Int8 is expanded to 16 bits in memory on every call, in the profile decode",
    ),
    "head from the left": ("w8a16", head_from_the_left, "Int8 is expanded to 16 bits in memory"),
    "second table": ("fp16", second_table, "looks up second_table, which is another table than the head's"),
}


@pytest.mark.parametrize("spelling", REFUSED)
def test_a_bad_spelling_is_found(engine_graph: EngineGraphs, tmp_path: Path, spelling: str) -> None:
    scheme, change, finding = REFUSED[spelling]
    graph = engine_graph(scheme).changed(spelling.replace(" ", "_"), change)
    with pytest.raises(EngineError, match=finding):
        graph.build(tmp_path, 89)
    assert list((tmp_path / "engines").iterdir()) == []


def test_a_plain_split_of_gate_and_up_is_found(tmp_path: Path) -> None:
    """The canonical graph in fp16, but for the passes that are there for TensorRT."""
    import torch

    from gemma_export.graphs.passes.half_precision import half_precision
    from gemma_export.graphs.passes.remove_dead_code import remove_dead_code

    def lower(model: ir.Model) -> None:
        half_precision(model, torch.float16, ())
        remove_dead_code(model)

    graph = write_engine_graph(tmp_path / "graph", "fp16", lower=lower)
    with pytest.raises(EngineError, match="some are stored twice"):
        graph.build(tmp_path, 89)


def test_attention_in_fp32_is_refused_and_found_where_it_is_allowed(
    engine_graph: EngineGraphs, tmp_path: Path
) -> None:
    def decomposable(graph: ir.Graph) -> None:
        for node in nodes(graph, "Attention"):
            node.attributes["TRT_decomposable"] = ir.AttrInt64("TRT_decomposable", 1)

    graph = engine_graph("fp32")
    with pytest.raises(EngineError, match=r"cannot compile model\.onnx for SM 89: .*dedicated kernel"):
        graph.build(tmp_path, 89)
    with pytest.raises(EngineError, match="0 of 2 attentions are one kernel in the profile prefill"):
        graph.changed("decomposable", decomposable).build(tmp_path, 89)
    assert list((tmp_path / "engines").iterdir()) == []


def test_the_graph_names_every_weight_and_who_reads_it(engine_graph: EngineGraphs) -> None:
    graph = read_graph(engine_graph("w8a8").file)
    assert graph.slots == SLOTS
    assert len(graph.caches) == 4
    assert len(graph.uses) == 2 * 4 + 2
    assert [use.lookup for use in graph.uses].count(True) == 1
    assert {(use.type, use.codes) for use in graph.uses if use.operator.startswith("layers")} == {
        ("Int8", True)
    }
    assert {"Half", "Int8", "Float"} <= graph.types


ONE = Range(1, 1, 1)
PROFILES = (Profile("prefill", ONE, Range(1, 8, 8)), Profile("decode", ONE, ONE))
USE = WeightUse("layers.0.mlp.down_proj", "layers.0.mlp.down_proj.codes", 512, "Int8", codes=True)
HEAD = WeightUse("head", "table", 2048, "Half")
LOOKUP = WeightUse("embed", "table", 2048, "Half", lookup=True)
CACHES = ("present.0.key", "present.0.value")
GRAPH = EngineGraph(Path("model.onnx"), (), CACHES, 8, (USE, HEAD, LOOKUP), frozenset(), attentions=1)


def kernel(profile: int, name: str = "k", **parts: object) -> Kernel:
    values: dict[str, object] = {"inputs": (), "constants": (), "outputs": (), "operators": frozenset()}
    return Kernel(f"{name}_myl{profile}_0", "kgen", profile, **{**values, **parts})  # type: ignore[arg-type]


def clean_kernels(profile: int) -> list[Kernel]:
    caches = tuple(PlanTensor(name, 64, "Half") for name in CACHES)
    table = (PlanTensor("table", 2048, "Half"),)
    return [
        kernel(profile, "_gemm_mha_v2"),
        kernel(profile, inputs=caches, outputs=caches),
        kernel(profile, constants=table, operators=frozenset({"head"})),
        kernel(profile, constants=table, operators=frozenset({"embed"})),
        kernel(
            profile,
            inputs=(PlanTensor("x", None, "Int8"),),
            constants=(PlanTensor("w", 512, "Int8"),),
            operators=frozenset({USE.operator}),
        ),
    ]


def audited(change: Callable[[list[Kernel]], None] = lambda kernels: None, **changes: object) -> str:
    """The findings about a plan that is clean but for a change."""
    kernels = [*clean_kernels(0), *clean_kernels(1)]
    change(kernels)
    values = {"weight_bytes": 1 << 20, "activation_bytes": (1, 1), **changes}
    plan = PlanText(tuple(kernels), **values)  # type: ignore[arg-type]
    return "; ".join(audit_plan(plan, GRAPH, PROFILES, 1 << 20).findings)


def test_a_clean_plan_has_no_findings() -> None:
    assert audited() == ""


def test_each_rule_is_asked_of_each_profile() -> None:
    last = 9
    assert "0 of 1 attentions are one kernel in the profile decode" in audited(lambda k: k.pop(5))
    assert "present.0.key is not updated in place in the profile decode" in audited(lambda k: k.pop(6))
    assert "head reads nothing that is stored and not the Half" in audited(lambda k: k.pop(7))
    assert "embed reads nothing" in audited(lambda k: k.pop(8))
    half = kernel(1, constants=(PlanTensor("w", 512, "Half"),), operators=frozenset({USE.operator}))
    floats = kernel(
        1,
        inputs=(PlanTensor("x", None, "Half"),),
        constants=(PlanTensor("w", 512, "Int8"),),
        operators=frozenset({USE.operator}),
    )
    assert "reads Half and not the Int8 of its weight" in audited(lambda k: k.__setitem__(last, half))
    assert "multiplies 16-bit numbers and not Int8" in audited(lambda k: k.__setitem__(last, floats))
    assert "kernels of 1 profiles, not of 2" in audited(lambda k: k.__delitem__(slice(5, 10)))
    assert "kernels of 2 profiles, not of 2" in audited(activation_bytes=(1,))


def test_a_projection_that_is_stored_twice_is_too_much() -> None:
    assert audited(weight_bytes=(1 << 20) + (64 << 10)) == ""
    assert "some are stored twice" in audited(weight_bytes=(1 << 20) + (128 << 10))


def test_an_input_that_no_kernel_reads_is_found() -> None:
    assert "takes no notice of the input length" in audited(unread=("length",))


def test_no_more_findings_are_told_than_a_person_reads() -> None:
    plan = PlanText(tuple(clean_kernels(0)), 0, (1, 1))
    audit = audit_plan(plan, GRAPH, PROFILES, 0)
    with pytest.raises(
        EngineError, match=r"^The engine is not what was asked for: .*; and \d more\."
    ) as found:
        require_clean(audit, "The engine")
    assert found.value.message.count(";") == 3


@pytest.mark.parametrize(
    "log",
    [
        [],
        ["Layers:\nName: k, LayerType: gemm, Inputs: []", "Total Weights Memory: 1 bytes"],
        [
            "Layers:\nName: k, LayerType: gemm, Inputs: []",
            "Total Weights Memory: 1 bytes",
            "Total Activation Memory: 1 bytes",
        ],
    ],
    ids=["nothing", "no activations", "another form"],
)
def test_a_plan_that_cannot_be_read_is_not_taken_for_a_good_one(log: list[str]) -> None:
    with pytest.raises(EngineError, match=r"TensorRT (does not say|describes a kernel)"):
        read_plan(log)
