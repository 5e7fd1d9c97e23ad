"""What the quantizing passes for a CPU refuse, and the rules of the graph that they leave."""

from collections.abc import Callable
from dataclasses import replace

import onnx_ir as ir
import pytest
import torch
from support.graphs import MakeGraph, canonical
from support.quantized_cpu import FLOAT, FP16, FP32, TOKEN, W4, W8, forms, small
from support.quantized_tiny import TABLE

from gemma_export.errors import GraphError
from gemma_export.graphs import schedule, spec
from gemma_export.graphs.formats import WeightFormat
from gemma_export.graphs.passes.quantize_embedding import quantize_embedding
from gemma_export.graphs.passes.quantized_layers import add_blocks
from gemma_export.graphs.quantization import LinearQuantization, Quantization
from gemma_export.graphs.tensors import InMemory, add_initializer, streamed

pytestmark = pytest.mark.usefixtures("one_thread")


@forms
@pytest.mark.parametrize("name", ["layers.1.mlp.down_proj", "layers.0.self_attn.qkv_proj", "embed_tokens"])
def test_a_layer_that_nothing_is_said_of(raw_graph: MakeGraph, how: LinearQuantization, name: str) -> None:
    linears = {other: chosen for other, chosen in small(how).linears.items() if other != name}
    with pytest.raises(GraphError, match=f"Nothing says how {name} is quantized"):
        schedule.lower(canonical(raw_graph), "cpu", FP32, FP32, quantization=Quantization({}, linears))


@pytest.mark.parametrize("name", ["layers.2.mlp.down_proj", "layers.0.self_attn.q_proj", "lm_head"])
def test_a_layer_that_is_not_there(raw_graph: MakeGraph, name: str) -> None:
    linears = {**small(TOKEN).linears, name: TOKEN}
    with pytest.raises(GraphError, match=f"no linear layer {name} to be quantized"):
        schedule.lower(canonical(raw_graph), "cpu", FP32, FP32, quantization=Quantization({}, linears))


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        (
            LinearQuantization("w8a8-tensor", WeightFormat(8), activation_scale=0.1),
            "w8a8-tensor for onnxruntime",
        ),
        (LinearQuantization("w8a8-token", WeightFormat(8, 16)), "8 bits and blocks of 16"),
        (LinearQuantization("w8a8-token", WeightFormat(4)), "4 bits and a scale per row"),
        (LinearQuantization("w8a8-token"), "with no format"),
        (LinearQuantization("w8", WeightFormat(4)), "4 bits and a scale per row"),
        (LinearQuantization("w8", WeightFormat(4, 16)), "4 bits and blocks of 16"),
        (LinearQuantization("w8", WeightFormat(8, 8)), "8 bits and blocks of 8"),
        (LinearQuantization("w8", WeightFormat(8, 512)), "8 bits and blocks of 512"),
        (LinearQuantization("w4", WeightFormat(8, 16)), "8 bits and blocks of 16"),
        (LinearQuantization("w4", WeightFormat(4, 48)), "4 bits and blocks of 48"),
        (LinearQuantization("w4"), "with no format"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.form,
)
def test_a_form_or_format_that_onnxruntime_does_not_know(
    raw_graph: MakeGraph, how: LinearQuantization, reason: str
) -> None:
    quantization = small(TOKEN, down_proj=how)
    with pytest.raises(GraphError, match=f"layers.0.mlp.down_proj cannot be .*{reason}"):
        schedule.lower(canonical(raw_graph), "cpu", FP32, FP32, quantization=quantization)


def test_blocks_that_do_not_divide_a_layer(raw_graph: MakeGraph) -> None:
    quantization = small(LinearQuantization("w8", WeightFormat(8, 64)))
    with pytest.raises(GraphError, match=r"q_proj.weight .* blocks of 64 do not divide rows of 32"):
        schedule.lower(canonical(raw_graph), "cpu", FP32, FP32, quantization=quantization)


def test_rows_that_no_block_divides() -> None:
    graph = ir.Graph([], [], nodes=[])
    with pytest.raises(GraphError, match="down_proj has 40 columns, which no block of onnxruntime's divides"):
        add_blocks(
            graph,
            "down_proj",
            InMemory("down_proj.weight", torch.ones(8, 40)),
            LinearQuantization("w8", WeightFormat(8)),
        )
    assert not graph.initializers


@pytest.mark.parametrize("how", [TOKEN, W4, replace(W8, form="w8a8-tensor")], ids=lambda how: how.form)
def test_a_table_of_another_form(raw_graph: MakeGraph, how: LinearQuantization) -> None:
    with pytest.raises(GraphError, match=f"embed_tokens cannot be {how.form} for onnxruntime"):
        schedule.lower(canonical(raw_graph), "cpu", FP32, FP32, quantization=small(TOKEN, how))


def test_a_table_with_blocks_that_do_not_divide_it(raw_graph: MakeGraph) -> None:
    with pytest.raises(GraphError, match=r"embed_tokens.weight .* blocks of 256 do not divide rows of 32"):
        schedule.lower(canonical(raw_graph), "cpu", FP32, FP32, quantization=small(TOKEN, TABLE))


def test_a_table_that_something_else_reads(raw_graph: MakeGraph) -> None:
    model = canonical(raw_graph)
    copy = ir.node("Identity", [model.graph.initializers["embed_tokens.weight"]])
    model.graph.append(copy)
    with pytest.raises(GraphError, match="embed_tokens is read by 2 operators, 1 of them heads"):
        quantize_embedding(model, small(TOKEN).linears)


def test_a_table_without_a_head(raw_graph: MakeGraph) -> None:
    model = canonical(raw_graph)
    head = next(
        use.node
        for use in model.graph.initializers["embed_tokens.weight"].uses()
        if use.node.op_type != "Gather"
    )
    head.attributes["perm"] = ir.AttrInt64s("perm", [0, 1])
    head.op_type = "Identity"
    with pytest.raises(GraphError, match="embed_tokens is read by 1 operators, 0 of them heads"):
        quantize_embedding(model, small(TOKEN).linears)


# The rules of the finished graph, broken on purpose.


def lowered(raw_graph: MakeGraph) -> ir.Model:
    model = canonical(raw_graph)
    schedule.lower(model, "cpu", FP16, FP32, quantization=small(TOKEN, qkv_proj=W8, o_proj=FLOAT))
    return model


def forget_to_round(graph: ir.Graph) -> None:
    next(node for node in graph if node.op_type == "QuantizeLinear").op_type = "Cast"


def drop_a_product(graph: ir.Graph) -> None:
    next(node for node in graph if node.op_type == "MatMulInteger").op_type = "MatMul"


def keep_a_float_copy(graph: ir.Graph) -> None:
    tensor = streamed(graph.initializers["layers.0.mlp.down_proj.codes"])
    assert tensor is not None
    copy = InMemory(tensor.source.name, torch.zeros(32, 48))
    graph.append(ir.node("Gelu", [add_initializer(graph, "layers.0.mlp.down_proj.weight", copy)]))


def pack_the_table_for_the_head(graph: ir.Graph) -> None:
    codes = graph.initializers["embed_tokens.codes"]
    tensor = streamed(codes)
    assert tensor is not None
    head = next(use.node for use in codes.uses() if use.node.op_type == "MatMulNBits")
    head.replace_input_with(1, add_initializer(graph, "lm_head.codes", tensor.source))


def look_up_other_scales(graph: ir.Graph) -> None:
    scales = graph.initializers["embed_tokens.scales"]
    lookup = next(use.node for use in scales.uses() if use.node.op_type == "Gather")
    others = InMemory("other", torch.ones(96, 2).bfloat16())
    lookup.replace_input_with(0, add_initializer(graph, "other.scales", others))


def look_up_a_second_table(graph: ir.Graph) -> None:
    table = add_initializer(graph, "second.weight", InMemory("second", torch.zeros(4, 4)))
    graph.append(ir.node("Gather", [table, graph.inputs[0]]))


def compute_the_codes(graph: ir.Graph) -> None:
    product = next(node for node in graph if node.op_type == "MatMulInteger")
    computed = ir.node("Identity", [product.inputs[1]])
    graph.insert_before(product, computed)
    product.replace_input_with(1, computed.outputs[0])


def store_wide_scales(graph: ir.Graph) -> None:
    product = next(node for node in graph if node.op_type == "MatMulNBits")
    product.replace_input_with(2, add_initializer(graph, "wide.scales", InMemory("wide", torch.ones(32, 2))))


def store_wide_scales_before_their_cast(graph: ir.Graph) -> None:
    product = next(node for node in graph if node.op_type == "MatMulNBits")
    cast = product.inputs[2].producer()  # type: ignore[union-attr]
    assert cast is not None
    cast.replace_input_with(0, add_initializer(graph, "wide.scales", InMemory("wide", torch.ones(32, 2))))


def narrow_the_scales(graph: ir.Graph) -> None:
    product = next(node for node in graph if node.op_type == "MatMulNBits")
    cast = product.inputs[2].producer()  # type: ignore[union-attr]
    assert cast is not None
    product.replace_input_with(2, cast.inputs[0])


def forget_a_function(graph: ir.Graph) -> None:
    next(node for node in graph if node.op_type == "GatedGelu").domain = "elsewhere"


def norm_a_sum_for_itself(graph: ir.Graph) -> None:
    call = next(node for node in graph if node.op_type == "ResidualNorm")
    add = ir.node("Add", call.inputs[:2])
    norm = ir.node("RMSNormalization", [add.outputs[0], call.inputs[2]], name="alone")
    graph.insert_before(call, [add, norm])
    call.outputs[1].replace_all_uses_with(norm.outputs[0])
    call.outputs[0].replace_all_uses_with(add.outputs[0])
    graph.remove(call)


@pytest.mark.parametrize(
    ("spoil", "rule"),
    [
        (forget_to_round, spec.quantized_operators_are_all_there),
        (drop_a_product, spec.quantized_operators_are_all_there),
        (keep_a_float_copy, spec.no_weight_is_stored_twice),
        (pack_the_table_for_the_head, spec.quantized_table_is_stored_once),
        (pack_the_table_for_the_head, spec.no_weight_is_stored_twice),
        (look_up_other_scales, spec.quantized_table_is_stored_once),
        (look_up_a_second_table, spec.quantized_table_is_stored_once),
        (forget_a_function, spec.norms_and_activations_are_fused),
        (norm_a_sum_for_itself, spec.norms_and_activations_are_fused),
        (compute_the_codes, spec.codes_are_read_as_codes),
        (narrow_the_scales, spec.codes_are_read_as_codes),
        (store_wide_scales, spec.codes_are_read_as_codes),
        (store_wide_scales_before_their_cast, spec.codes_are_read_as_codes),
    ],
    ids=lambda item: item.__name__,
)
def test_a_broken_rule_is_seen(
    raw_graph: MakeGraph, spoil: Callable[[ir.Graph], None], rule: spec.Rule
) -> None:
    model = lowered(raw_graph)
    assert rule(model) is None
    spoil(model.graph)
    assert rule(model) is not None
    with pytest.raises(GraphError, match="quantized CPU graph breaks the rule"):
        spec.CPU_QUANTIZED.check(model)


@pytest.mark.parametrize("form", ["w8", "w4", "float"])
def test_a_layer_of_another_form_than_chosen_is_seen(raw_graph: MakeGraph, form: str) -> None:
    chosen = {name: how.form for name, how in small(TOKEN, qkv_proj=W8, o_proj=FLOAT).linears.items()}
    model = lowered(raw_graph)
    spec.cpu_quantized(chosen).check(model)
    chosen["layers.1.mlp.gate_up_proj"] = form  # type: ignore[assignment]
    with pytest.raises(GraphError, match=f"layers.1.mlp.gate_up_proj is w8a8-token, not {form}"):
        spec.cpu_quantized(chosen).check(model)
    del chosen["layers.1.mlp.gate_up_proj"]
    with pytest.raises(GraphError, match="up_proj is w8a8-token, not None"):
        spec.cpu_quantized(chosen).check(model)
    with pytest.raises(GraphError, match="lm_head is missing, not w8"):
        spec.cpu_quantized({**chosen, "layers.1.mlp.gate_up_proj": "w8a8-token", "lm_head": "w8"}).check(
            model
        )
