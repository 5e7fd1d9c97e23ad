"""What each pass must leave alone: one layer of a graph is made illegal for it, and it fires once less often.

The cases are those that the passes' docstrings number. Where a spoilt graph still runs, the other layer must
have been rewritten without changing a number.
"""

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest
import torch
from support.graphs import decoder_feeds, producer, run

from gemma_export.graphs import schedule
from gemma_export.graphs.passes.fold_norm_gain import fold_norm_gain
from gemma_export.graphs.passes.fold_reshape import fold_reshape
from gemma_export.graphs.passes.fuse_attention import fuse_attention
from gemma_export.graphs.passes.fuse_functions import fuse_gated_gelu, fuse_residual_norm
from gemma_export.graphs.passes.fuse_rms_norm import fuse_rms_norm
from gemma_export.graphs.passes.fuse_rotary import fuse_rotary
from gemma_export.graphs.passes.lower_group_query_attention import lower_group_query_attention
from gemma_export.graphs.passes.lower_linear import lower_linear
from gemma_export.graphs.passes.merge_gate_up import merge_gate_up
from gemma_export.graphs.passes.merge_projections import find_linear, merge_projections
from gemma_export.graphs.passes.scatter_cache import scatter_cache
from gemma_export.graphs.passes.share_embedding import share_embedding
from gemma_export.graphs.tensors import Cast, InMemory, StreamedTensor, streamed

STEPS = (*schedule.CANONICAL, *schedule.ONNXRUNTIME, *schedule.FUNCTIONS)
Spoil = Callable[[ir.Graph], None]


def first(graph: ir.Graph, op_type: str, nth: int = 0) -> ir.Node:
    """The nth operator of a type."""
    return [node for node in graph if node.op_type == op_type][nth]


def constant(graph: ir.Graph, values: object, dtype: ir.DataType = ir.DataType.FLOAT) -> ir.Value:
    """A new constant initializer."""
    name = f"spoilt_{len(graph.initializers)}"
    tensor = ir.tensor(np.asarray(values, dtype.numpy()), name=name)
    value = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


def linear(graph: ir.Graph, name: str) -> ir.Node:
    """The product with the weight of a name."""
    for node in graph:
        found = find_linear(node)
        if found is not None and found.weight.name == name:
            return found.product
    raise LookupError(name)


# fold_norm_gain: (1) the addend is not 1, (2) the weight is computed or has lost digits.
def add_two(graph: ir.Graph) -> None:
    gain = next(node for node in graph if node.op_type == "Add" and streamed(node.inputs[0]) is not None)
    gain.replace_input_with(1, constant(graph, 2.0))


def add_a_vector(graph: ir.Graph) -> None:
    gain = next(node for node in graph if node.op_type == "Add" and streamed(node.inputs[0]) is not None)
    gain.replace_input_with(1, constant(graph, np.ones(32)))


def gain_in_bf16(graph: ir.Graph) -> None:
    weight = graph.initializers["norm.weight"]
    tensor = streamed(weight)
    assert tensor is not None
    weight.const_value = StreamedTensor(Cast(tensor.source, torch.bfloat16))


# fuse_rms_norm: (1) the axis, (2) the exponent and epsilon, (3) the gain.
def mean_over_tokens(graph: ir.Graph) -> None:
    first(graph, "ReduceMean").replace_input_with(1, constant(graph, [1], ir.DataType.INT64))


def fourth_power(graph: ir.Graph) -> None:
    first(graph, "Pow").replace_input_with(1, constant(graph, 4.0))


def epsilon_of_zero(graph: ir.Graph) -> None:
    node = producer(first(graph, "Sqrt").inputs[0])
    node.replace_input_with(1, constant(graph, 0.0))


def one_gain_for_all(graph: ir.Graph) -> None:
    gain = graph.initializers["norm.gain"]
    gain.uses()[0].node.replace_input_with(1, constant(graph, [1.0]))


# fuse_rotary: (1) the halves, (2) the tables, (3) the broadcast.
def rotate_backwards(graph: ir.Graph) -> None:
    node = first(graph, "Sub")
    left, right = node.inputs
    node.replace_input_with(0, right)
    node.replace_input_with(1, left)


def three_parts(graph: ir.Graph) -> None:
    split = producer(producer(first(graph, "Sub").inputs[0]).inputs[0])
    split.attributes["axis"] = ir.AttrInt64("axis", 2)


def sine_for_cosine(graph: ir.Graph) -> None:
    sub = first(graph, "Sub")
    producer(sub.inputs[0]).replace_input_with(1, producer(sub.inputs[1]).inputs[1])


# scatter_cache: (1) other indices, (2) a reducing write, (3) what is written into.
def other_indices(graph: ir.Graph) -> None:
    index = first(graph, "ScatterElements").inputs[1]
    sum_of = ir.node("Add", [index, constant(graph, 0, ir.DataType.INT64)])
    graph.insert_before(first(graph, "ScatterElements"), sum_of)
    sum_of.outputs[0].dtype, sum_of.outputs[0].name = ir.DataType.INT64, "other"
    first(graph, "ScatterElements").replace_input_with(1, sum_of.outputs[0])


def add_into_the_cache(graph: ir.Graph) -> None:
    first(graph, "ScatterElements").attributes["reduction"] = ir.AttrString("reduction", "add")


def write_into_a_copy(graph: ir.Graph) -> None:
    scatter = first(graph, "ScatterElements")
    copy = ir.node("Identity", [scatter.inputs[0]])
    graph.insert_before(scatter, copy)
    copy.outputs[0].dtype, copy.outputs[0].name = ir.DataType.FLOAT, "copy"
    copy.outputs[0].shape = scatter.inputs[0].shape  # type: ignore[union-attr]
    scatter.replace_input_with(0, copy.outputs[0])


# fuse_attention: (1) softmax and scale, (2) the heads' split, (3) the layout of keys and mask.
def softmax_over_queries(graph: ir.Graph) -> None:
    first(graph, "Softmax").attributes["axis"] = ir.AttrInt64("axis", -2)


def scale_by_head(graph: ir.Graph) -> None:
    scale = producer(producer(first(graph, "Softmax").inputs[0]).inputs[0])
    scale.replace_input_with(1, constant(graph, np.full((1, 1, 4, 1, 1), 0.25)))


def keys_not_transposed(graph: ir.Graph) -> None:
    scores = producer(producer(producer(first(graph, "Softmax").inputs[0]).inputs[0]).inputs[0])
    producer(scores.inputs[1]).attributes["perm"] = ir.AttrInt64s("perm", [0, 1, 2, 3, 4])


# merge_projections: (1) one input, (2) stored weights used once, (3) equal heads.
def a_projection_of_something_else(graph: ir.Graph) -> None:
    product = linear(graph, "layers.1.self_attn.v_proj.weight")
    product.replace_input_with(0, linear(graph, "layers.0.self_attn.v_proj.weight").inputs[0])


def a_weight_with_another_use(graph: ir.Graph) -> None:
    extra = ir.node("Shape", [graph.initializers["layers.0.self_attn.q_proj.weight"]])
    graph.append(extra)


def one_weight_in_bf16(graph: ir.Graph) -> None:
    weight = graph.initializers["layers.0.self_attn.k_proj.weight"]
    tensor = streamed(weight)
    assert tensor is not None
    weight.const_value = StreamedTensor(Cast(tensor.source, torch.bfloat16))


# merge_gate_up: (1) one input, equal widths, (2) stored weights used once, (3) which is the gate.
def no_activation(graph: ir.Graph) -> None:
    gelu = first(graph, "Gelu")
    gelu.op_type = "Tanh"
    gelu.attributes.clear()


def both_activated(graph: ir.Graph) -> None:
    up = linear(graph, "layers.0.mlp.up_proj.weight").outputs[0]
    gelu = ir.node("Gelu", [up], attributes={"approximate": "tanh"})
    user = next(use.node for use in up.uses() if use.node is not gelu)
    graph.insert_before(user, gelu)
    gelu.outputs[0].dtype, gelu.outputs[0].name = ir.DataType.FLOAT, "activated_up"
    user.replace_input_with(1, gelu.outputs[0])


def an_up_of_something_else(graph: ir.Graph) -> None:
    product = linear(graph, "layers.1.mlp.up_proj.weight")
    product.replace_input_with(0, linear(graph, "layers.0.mlp.up_proj.weight").inputs[0])


# share_embedding: an untied head keeps its table.
def untie_the_head(graph: ir.Graph) -> None:
    table = graph.initializers["embed_tokens.weight"]
    tensor = streamed(table)
    assert tensor is not None
    own = InMemory("lm_head.weight", tensor.source.read(0, tensor.source.shape[0]) + 1)
    head = ir.Value(name="lm_head.weight", shape=table.shape, const_value=StreamedTensor(own))
    head.dtype = ir.DataType.FLOAT
    graph.register_initializer(head)
    next(use.node for use in table.uses() if use.node.op_type == "Transpose").replace_input_with(0, head)


# lower_group_query_attention: (1) the mask, (2) the tables, (3) the head size.
def a_sliding_window(graph: ir.Graph) -> None:
    attention = first(graph, "Attention")
    window = ir.node("Add", [attention.inputs[3], constant(graph, 0.0)])
    graph.insert_before(attention, window)
    window.outputs[0].dtype, window.outputs[0].name = ir.DataType.FLOAT, "window"
    attention.replace_input_with(3, window.outputs[0])


def other_tables_for_keys(graph: ir.Graph) -> None:
    keys = first(graph, "RotaryEmbedding", 1)
    keys.replace_input_with(1, graph.initializers["rotary_sin"])


def values_of_the_keys(graph: ir.Graph) -> None:
    write_key, write_value = first(graph, "TensorScatter", 0), first(graph, "TensorScatter", 1)
    write_value.replace_input_with(1, producer(write_key.inputs[1]).inputs[0])


# lower_linear: the weight is not stored.
def a_computed_weight(graph: ir.Graph) -> None:
    product = linear(graph, "layers.0.mlp.down_proj.weight")
    transpose = producer(product.inputs[1])
    copy = ir.node("Neg", [transpose.inputs[0]])
    graph.insert_before(transpose, copy)
    copy.outputs[0].dtype, copy.outputs[0].name = ir.DataType.FLOAT, "computed"
    transpose.replace_input_with(0, copy.outputs[0])


# fuse_gated_gelu: (1) another Gelu, halves of another axis, a half with another reader.
def an_exact_activation(graph: ir.Graph) -> None:
    first(graph, "Gelu").attributes["approximate"] = ir.AttrString("approximate", "none")


def an_activation_of_the_other_half(graph: ir.Graph) -> None:
    first(graph, "Gelu").replace_input_with(0, first(graph, "Split").outputs[1])


def a_gate_with_another_reader(graph: ir.Graph) -> None:
    product = producer(first(graph, "Gelu").outputs[0].uses()[0].node.outputs[0])
    product.replace_input_with(1, first(graph, "Split").outputs[0])


# fuse_residual_norm: (2) no sum, or one of unequal shapes.
def a_norm_of_a_difference(graph: ir.Graph) -> None:
    producer(first(graph, "RMSNormalization", 1).inputs[0]).op_type = "Sub"


def a_sum_with_a_vector(graph: ir.Graph) -> None:
    add = producer(first(graph, "RMSNormalization", 1).inputs[0])
    add.replace_input_with(1, constant(graph, [0.5]))


# fold_reshape: an element of the shape is another axis' size.
def axes_swapped(graph: ir.Graph) -> None:
    reshape = first(graph, "Reshape")
    shape = producer(reshape.inputs[1])
    batch, tokens = shape.inputs[:2]
    swapped = ir.node("Concat", [tokens, batch, *shape.inputs[2:]], attributes={"axis": 0})
    graph.insert_before(reshape, swapped)
    swapped.outputs[0].dtype, swapped.outputs[0].name = ir.DataType.INT64, "swapped"
    reshape.replace_input_with(1, swapped.outputs[0])
    output = reshape.outputs[0]
    assert output.shape is not None
    output.shape = ir.Shape([output.shape[1], output.shape[0], *output.shape[2:]])


# Each pass, what is spoilt, how many times less it fires, and whether the spoilt graph can still be run.
CASES: list[tuple[Callable[[ir.Model], int], Spoil, int, bool]] = [
    (fold_norm_gain, add_two, 1, True),
    (fold_norm_gain, add_a_vector, 1, True),
    (fold_norm_gain, gain_in_bf16, 1, False),
    (fuse_rms_norm, mean_over_tokens, 1, True),
    (fuse_rms_norm, fourth_power, 1, True),
    (fuse_rms_norm, epsilon_of_zero, 1, True),
    (fuse_rms_norm, one_gain_for_all, 1, True),
    (fuse_rotary, rotate_backwards, 1, True),
    (fuse_rotary, three_parts, 1, False),
    (fuse_rotary, sine_for_cosine, 1, True),
    (scatter_cache, other_indices, 1, True),
    (scatter_cache, add_into_the_cache, 1, True),
    (scatter_cache, write_into_a_copy, 1, True),
    (fuse_attention, softmax_over_queries, 1, True),
    (fuse_attention, scale_by_head, 1, True),
    (fuse_attention, keys_not_transposed, 1, True),
    # Layer 0's input then has four readers, and layer 1's has two: neither is a set of three.
    (merge_projections, a_projection_of_something_else, 2, True),
    (merge_projections, a_weight_with_another_use, 1, True),
    (merge_projections, one_weight_in_bf16, 1, False),
    (merge_gate_up, no_activation, 1, True),
    (merge_gate_up, both_activated, 1, True),
    (merge_gate_up, an_up_of_something_else, 2, True),
    (share_embedding, untie_the_head, 1, True),
    (lower_group_query_attention, a_sliding_window, 1, True),
    (lower_group_query_attention, other_tables_for_keys, 1, True),
    (lower_group_query_attention, values_of_the_keys, 1, True),
    (lower_linear, a_computed_weight, 1, True),
    (fold_reshape, axes_swapped, 1, False),
    (fuse_gated_gelu, an_exact_activation, 1, True),
    (fuse_gated_gelu, an_activation_of_the_other_half, 1, True),
    (fuse_gated_gelu, a_gate_with_another_reader, 1, True),
    (fuse_residual_norm, a_norm_of_a_difference, 1, True),
    (fuse_residual_norm, a_sum_with_a_vector, 1, True),
]


@pytest.mark.parametrize(
    ("rewrite", "spoil", "fewer", "runs"), CASES, ids=[f"{c[0].__name__}-{c[1].__name__}" for c in CASES]
)
def test_what_is_illegal_is_left_alone(
    raw_graph: Callable[..., ir.Model],
    rewrite: Callable[[ir.Model], int],
    spoil: Spoil,
    fewer: int,
    runs: bool,
) -> None:
    usual = _prepared(raw_graph, rewrite)
    count = rewrite(usual)

    model = _prepared(raw_graph, rewrite)
    spoil(model.graph)
    if runs:
        feeds = decoder_feeds(model, batch=1, tokens=3, start=2)
        before = run(model, feeds)
    assert rewrite(model) == count - fewer
    if runs:
        after = run(model, feeds)
        for name, values in before.items():
            valid = np.s_[:] if name == "logits" else np.s_[:, :, :5]
            # As in test_schedule; a spoilt model's numbers may be large, so relative to the largest.
            scale = float(np.max(np.abs(values[valid])))
            np.testing.assert_allclose(after[name][valid], values[valid], rtol=0, atol=5e-6 * max(1.0, scale))


def _prepared(raw_graph: Callable[..., ir.Model], rewrite: Callable[[ir.Model], int]) -> ir.Model:
    """A graph as the pass finds it."""
    model = raw_graph()
    index = next(i for i, step in enumerate(STEPS) if step.run is rewrite)
    schedule.run(model, STEPS[:index])
    return model
