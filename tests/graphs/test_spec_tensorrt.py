"""TensorRT's graph keeps its rules in every precision; and each rule, broken on purpose."""

from collections.abc import Callable

import onnx_ir as ir
import pytest
import torch
from support.graphs import MakeGraph, producer

from gemma_export.errors import GraphError
from gemma_export.graphs import schedule, spec, spec_tensorrt
from gemma_export.graphs.formats import WeightFormat
from gemma_export.graphs.quantization import LinearQuantization, Quantization
from gemma_export.graphs.tensors import InMemory, add_initializer, streamed

Spoil = Callable[[ir.Graph], None]

LAYERS = 2
ROWS = LinearQuantization("w8", WeightFormat(8))
HOW = {
    "w8": ROWS,
    "w8a8-tensor": LinearQuantization("w8a8-tensor", WeightFormat(8), activation_scale=0.025),
    "w4": LinearQuantization("w4", WeightFormat(4, 16)),
    "float": LinearQuantization("float"),
}
PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
LINEARS = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")


def lowered(raw_graph: MakeGraph, precision: str, table: str = "w8", target: str = "rtx") -> ir.Model:
    """The graph of a floating precision, or of a form of quantized layers in fp16."""
    model = raw_graph()
    schedule.canonicalize(model)
    dtype, quantization = PRECISIONS.get(precision, torch.float16), None
    if precision in HOW:
        names = [f"layers.{i}.{name}" for i in range(LAYERS) for name in LINEARS]
        quantization = Quantization({}, {"embed_tokens": HOW[table], **dict.fromkeys(names, HOW[precision])})
    schedule.lower(model, target, dtype, dtype, quantization=quantization)
    return model


@pytest.mark.parametrize("target", ["onnx", "rtx", "tensorrt"])
@pytest.mark.parametrize("precision", [*PRECISIONS, *HOW])
def test_every_target_that_tensorrt_compiles_has_the_same_graph(
    raw_graph: MakeGraph, target: str, precision: str
) -> None:
    def nodes(model: ir.Model) -> list[tuple[str, object, object]]:
        return [(node.op_type, node.name, node.outputs[0].dtype) for node in model.graph]

    model = lowered(raw_graph, precision, target=target)  # Its rules are checked at the end of the schedule.
    assert nodes(model) == nodes(lowered(raw_graph, precision, target="onnx"))


def test_a_table_of_numbers_beside_layers_of_codes_keeps_the_rules(raw_graph: MakeGraph) -> None:
    lowered(raw_graph, "w8", table="float")


def test_every_value_of_a_layer_keeps_its_name(raw_graph: MakeGraph) -> None:
    """An audit of the engine finds a layer by the name of its node."""
    for precision in (*PRECISIONS, *HOW):
        names = {str(node.name).removesuffix(".unscaled") for node in lowered(raw_graph, precision).graph}
        wanted = {f"layers.{i}.{name}" for i in range(LAYERS) for name in LINEARS}
        assert wanted | {"embed_tokens", "lm_head"} <= names, precision


# Every rule, broken.


def first(graph: ir.Graph, op_type: str) -> ir.Node:
    return next(node for node in graph if node.op_type == op_type)


def put_between(graph: ir.Graph, node: ir.Node, index: int, between: ir.Node) -> None:
    """Puts a node with one input between a node and its operand."""
    operand = node.inputs[index]
    assert operand is not None
    between.replace_input_with(0, operand)
    between.outputs[0].shape, between.outputs[0].dtype = operand.shape, operand.dtype
    between.outputs[0].name = between.name = "between"
    graph.insert_before(node, between)
    node.replace_input_with(index, between.outputs[0])


def mask_in_fp32(graph: ir.Graph) -> None:
    cast = ir.node("Cast", [None], attributes={"to": ir.DataType.FLOAT})
    put_between(graph, first(graph, "Attention"), 3, cast)
    cast.outputs[0].dtype = ir.DataType.FLOAT


def mark_causal(graph: ir.Graph) -> None:
    first(graph, "Attention").attributes["is_causal"] = ir.AttrInt64("is_causal", 1)


def count_valid_slots(graph: ir.Graph) -> None:
    node = first(graph, "Attention")
    node.resize_inputs(7)
    node.replace_input_with(6, graph.inputs[1])


def forget_a_cast(graph: ir.Graph) -> None:
    cast = next(node for node in graph if node.op_type == "Cast" and node.inputs[0] is not None)
    cast.outputs[0].replace_all_uses_with(cast.inputs[0])


def copy_a_cache(graph: ir.Graph) -> None:
    put_between(graph, first(graph, "TensorScatter"), 0, ir.node("Identity", [None]))


def write_along_the_heads(graph: ir.Graph) -> None:
    first(graph, "TensorScatter").attributes["axis"] = ir.AttrInt64("axis", 1)


def write_around_the_end(graph: ir.Graph) -> None:
    first(graph, "TensorScatter").attributes["mode"] = ir.AttrString("mode", "circular")


def cache_in_8_bits(graph: ir.Graph) -> None:
    graph.inputs[2].dtype = graph.outputs[1].dtype = ir.DataType.INT8


def store_columns_of_outputs(graph: ir.Graph) -> None:
    product = first(graph, "MatMul")
    weight = producer(product.inputs[1]).inputs[0]
    tensor = streamed(weight)
    assert tensor is not None
    columns = tensor.source.read(0, tensor.source.shape[0]).T.contiguous()
    product.replace_input_with(1, add_initializer(graph, "columns", InMemory("columns", columns)))


def an_axis_for_the_batch(graph: ir.Graph) -> None:
    value = first(graph, "MatMul").inputs[0]
    assert value is not None
    value.shape = ir.Shape(["batch", "tokens", 32])


def split_the_product_itself(graph: ir.Graph) -> None:
    splits = [node for node in graph if node.op_type == "Split"]
    pair = next(node for node in splits if producer(node.inputs[0]).op_type == "Reshape")
    pair.replace_input_with(0, producer(pair.inputs[0]).inputs[0])


def store_the_table_again(graph: ir.Graph) -> None:
    table = graph.initializers["embed_tokens.weight"]
    tensor = streamed(table)
    assert tensor is not None
    copy = add_initializer(graph, "lm_head.weight", tensor.source)
    next(use.node for use in table.uses() if use.node.op_type == "Transpose").replace_input_with(0, copy)


def cast_codes(graph: ir.Graph) -> None:
    dequantize = first(graph, "DequantizeLinear")
    cast = ir.node("Cast", [dequantize.inputs[0]], attributes={"to": ir.DataType.FLOAT16})
    cast.outputs[0].name, cast.outputs[0].dtype = "cast", ir.DataType.FLOAT16
    cast.outputs[0].shape = dequantize.outputs[0].shape
    graph.insert_before(dequantize, cast)
    dequantize.outputs[0].replace_all_uses_with(cast.outputs[0])


def a_scale_per_row(graph: ir.Graph) -> None:
    dequantize = next(
        node
        for node in graph
        if node.op_type == "DequantizeLinear" and "qkv_proj" in str(node.name) and streamed(node.inputs[0])
    )
    rows = InMemory("rows", torch.ones(96, dtype=torch.float16))
    dequantize.replace_input_with(1, add_initializer(graph, "rows", rows))
    dequantize.attributes["axis"] = ir.AttrInt64("axis", 0)


def look_up_in_rows(graph: ir.Graph) -> None:
    lookup = next(node for node in graph if node.name == "embed_tokens.unscaled")
    table = producer(lookup.inputs[0]).inputs[0]
    lookup.replace_input_with(0, table)
    lookup.attributes["axis"] = ir.AttrInt64("axis", 0)


def another_dequantize_for_the_head(graph: ir.Graph) -> None:
    head = next(node for node in graph if node.op_type == "MatMul" and str(node.name).startswith("lm_head"))
    transpose = producer(head.inputs[1])
    dequantize = producer(transpose.inputs[0])
    numbers = ir.node("DequantizeLinear", dequantize.inputs)
    turned = ir.node("Transpose", [numbers.outputs[0]], attributes={"perm": [1, 0]})
    for node, like in ((numbers, dequantize), (turned, transpose)):
        node.outputs[0].name = node.name = f"lm_head.{node.op_type}"
        node.outputs[0].shape, node.outputs[0].dtype = like.outputs[0].shape, like.outputs[0].dtype
        graph.insert_before(head, node)
    head.replace_input_with(1, turned.outputs[0])


def forget_to_round(graph: ir.Graph) -> None:
    product = next(
        node for node in graph if "layers.1.mlp.down_proj" in str(node.name) and node.op_type == "MatMul"
    )
    product.replace_input_with(0, producer(producer(product.inputs[0]).inputs[0]).inputs[0])


def test_a_product_of_another_form_is_seen(raw_graph: MakeGraph) -> None:
    model = lowered(raw_graph, "w8a8-tensor")
    forget_to_round(model.graph)
    forms = dict.fromkeys((f"layers.{i}.{name}" for i in range(LAYERS) for name in LINEARS), "w8a8-tensor")
    rule = spec.forms_are_those_chosen({"embed_tokens": "w8"} | forms)  # type: ignore[arg-type]
    assert rule(model) == "layers.1.mlp.down_proj is w8, not w8a8-tensor"


BREAKAGES: list[tuple[str, Spoil, spec.Rule]] = [
    ("fp16", mask_in_fp32, spec_tensorrt.masks_have_the_format_of_queries),
    ("bf16", mask_in_fp32, spec_tensorrt.masks_have_the_format_of_queries),
    ("fp16", mark_causal, spec.attention_masks_are_explicit),
    ("fp16", count_valid_slots, spec.attention_masks_are_explicit),
    ("fp16", forget_a_cast, spec_tensorrt.operands_have_one_format),
    ("w8", copy_a_cache, spec_tensorrt.caches_are_scattered_in_place),
    ("fp16", write_along_the_heads, spec_tensorrt.caches_are_scattered_in_place),
    ("fp16", write_around_the_end, spec_tensorrt.caches_are_scattered_in_place),
    ("w8", cache_in_8_bits, spec_tensorrt.caches_are_scattered_in_place),
    ("fp16", store_columns_of_outputs, spec_tensorrt.weights_are_rows_behind_one_transpose),
    ("w4", an_axis_for_the_batch, spec_tensorrt.products_have_all_tokens_on_one_axis),
    ("fp16", split_the_product_itself, spec_tensorrt.products_get_an_axis_before_they_are_split),
    ("w8", split_the_product_itself, spec_tensorrt.products_get_an_axis_before_they_are_split),
    ("fp16", store_the_table_again, spec.embedding_is_stored_once),
    ("w8", cast_codes, spec_tensorrt.codes_only_become_numbers),
    ("w4", cast_codes, spec_tensorrt.codes_only_become_numbers),
    ("w8a8-tensor", a_scale_per_row, spec_tensorrt.codes_of_8_bits_have_one_step),
    ("w8", look_up_in_rows, spec_tensorrt.table_of_codes_is_read_once),
    ("w4", another_dequantize_for_the_head, spec_tensorrt.table_of_codes_is_read_once),
]


@pytest.mark.parametrize(
    ("precision", "spoil", "rule"), BREAKAGES, ids=[f"{p}-{spoil.__name__}" for p, spoil, _ in BREAKAGES]
)
def test_a_broken_rule_is_seen(raw_graph: MakeGraph, precision: str, spoil: Spoil, rule: spec.Rule) -> None:
    model = lowered(raw_graph, precision)
    assert rule(model) is None
    spoil(model.graph)
    assert rule(model) is not None
    names = {"embed_tokens": "w8"} | {
        f"layers.{i}.{name}": precision for i in range(LAYERS) for name in LINEARS
    }
    rules = spec_tensorrt.quantized(names) if precision in HOW else spec_tensorrt.TENSORRT  # type: ignore[arg-type]
    assert rule in rules.rules
    with pytest.raises(GraphError, match="TensorRT graph breaks the rule"):
        rules.check(model)
