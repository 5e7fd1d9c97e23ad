"""For TensorRT: attention with a soft-cap, which its own has not, becomes products, a cap and a softmax.

    Attention(q, key, value, mask, scale, softcap)
        →  for each j below G = H / K, over q's heads j, G + j, 2G + j, …:
               scores  = MatMul(q_j, Transpose(key))                                    [B, K, T, S]
               weights = Softmax(Tanh(scores / (softcap / scale)) · softcap + mask)     [B, K, T, S]
               head_j  = Transpose(MatMul(Transpose(value), Transpose(weights)))        [B, K, T, h]
           Reshape(Concat(head_0, …))                                                   [B, H, T, h]
       and after the heads were merged, Max(x, x)                                       [B, T, H · h]

with q [B, H, T, h], key and value [B, K, S, h], mask [B, 1, T, S]. It is the same function, of operators that
every runtime has. Between the products everything is in fp32 (`half_precision` sees to it), so that cap and
softmax add nothing to what 16 bits lose. The scores themselves are rounded to 16 bits, as everywhere without
a fused kernel; one that leaves fp16 is infinite there, and becomes the cap, which is what it would have been.

The spelling is the one in which TensorRT for RTX 1.7 decodes without copying the cache. It copies all slots
of it, for each token, when the G heads of a group are rows of one product or an axis that is broadcast, or
when values are not transposed. This way a cache is read G times, in every Gemma 2 twice; a copy would be
read, written and read. For several tokens both caches are copied, once for all of them.

The greater of a number and itself is that number, and arithmetic to TensorRT: behind heads that were only
moved about, the kernel of the next product makes numbers of all its 8-bit codes in memory in every step.

Illegal, and left alone, when:
  (1) there is no soft-cap: then TensorRT has one kernel for all of it;
  (2) the attention is to be computed in fp32: the cache would be made fp32 in memory in every step.
"""

from collections.abc import Collection, Sequence
from functools import partial

import onnx_ir as ir

from gemma_export.graphs.passes.patterns import stand_in, users
from gemma_export.graphs.passes.quantized_layers import add_constant

_LAST_TWO = [0, 1, 3, 2]
_END = 2**31 - 1


def decompose_attention(model: ir.Model, keep: Collection[str] = ()) -> int:
    """Decomposes every attention with a soft-cap; returns how many.

    Args:
        model: The graph before its formats are chosen, all in fp32.
        keep: Names of the values that are computed in fp32.
    """
    found = [node for node in model.graph if _has_soft_cap(node) and node.outputs[0].name not in keep]
    for node in found:
        _decompose(model.graph, node)
    return len(found)


def count_soft_caps(model: ir.Model, keep: Collection[str] = ()) -> int:
    """How many attentions of a graph `decompose_attention` decomposes."""
    return sum(_has_soft_cap(node) and node.outputs[0].name not in keep for node in model.graph)


def _has_soft_cap(node: ir.Node) -> bool:
    return node.op_type == "Attention" and "softcap" in node.attributes


def _decompose(graph: ir.Graph, attention: ir.Node) -> None:
    query, key, value, mask = attention.inputs[:4]
    assert query is not None
    assert query.shape is not None
    assert key is not None
    assert key.shape is not None
    rows, query_heads, tokens, width = query.shape
    kv_heads, slots = key.shape[1], key.shape[2]
    assert isinstance(query_heads, int)
    assert isinstance(kv_heads, int)
    assert isinstance(width, int)
    groups = query_heads // kv_heads
    cap, scale = attention.attributes["softcap"].as_float(), attention.attributes["scale"].as_float()
    constant = partial(add_constant, graph, dtype=ir.DataType.INT64)
    insert = partial(_insert, graph, attention)
    heads_axis, group_axis = constant("axis_1", [1]), constant("axis_2", [2])

    keys = insert("Transpose", "keys", [key], [rows, kv_heads, width, slots], perm=_LAST_TWO)
    values = insert("Transpose", "values", [value], [rows, kv_heads, width, slots], perm=_LAST_TWO)
    soft_cap, bound = (
        add_constant(graph, "cap_of_scores", cap),
        add_constant(graph, "cap_of_products", cap / scale),
    )
    matrix = [rows, kv_heads, tokens, slots]
    parts = []
    for j in range(groups):
        starts, steps, ends = (
            constant(f"head_{j}", [j]),
            constant(f"every_{groups}", [groups]),
            constant("end", [_END]),
        )
        mine = insert(
            "Slice", f"query.{j}", [query, starts, ends, heads_axis, steps], [rows, kv_heads, tokens, width]
        )
        scores = insert("MatMul", f"scores.{j}", [mine, keys], matrix)
        ratio = insert("Div", f"ratio.{j}", [scores, bound], matrix)
        capped = insert(
            "Mul", f"capped.{j}", [insert("Tanh", f"tanh.{j}", [ratio], matrix), soft_cap], matrix
        )
        masked = insert("Add", f"masked.{j}", [capped, mask], matrix)
        weights = insert("Softmax", f"weights.{j}", [masked], matrix, axis=-1)
        columns = insert(
            "Transpose", f"columns.{j}", [weights], [rows, kv_heads, slots, tokens], perm=_LAST_TWO
        )
        head = insert("MatMul", f"attended.{j}", [values, columns], [rows, kv_heads, width, tokens])
        upright = insert("Transpose", f"head.{j}", [head], [rows, kv_heads, tokens, width], perm=_LAST_TWO)
        parts.append(
            insert("Unsqueeze", f"group.{j}", [upright, group_axis], [rows, kv_heads, 1, tokens, width])
        )
    together = insert("Concat", "groups", parts, [rows, kv_heads, groups, tokens, width], axis=2)
    sizes = constant(f"shape_0_{query_heads}_-1_{width}", [0, query_heads, -1, width])
    merged = ir.node("Reshape", [together, sizes], name=attention.name)
    graph.insert_before(attention, merged)
    output, replaced = merged.outputs[0], attention.outputs[0]
    stand_in(output, replaced)
    replaced.replace_all_uses_with(output)
    replaced.name = f"{output.name}.replaced"
    graph.remove(attention, safe=True)
    _compute(graph, output)


def _compute(graph: ir.Graph, heads: ir.Value) -> None:
    """Ends what merges the heads with arithmetic."""
    merged = heads
    while (readers := users(merged)) and readers[0].op_type in ("Reshape", "Transpose"):
        merged = readers[0].outputs[0]
    last = merged.producer()
    assert last is not None
    greater = ir.node("Max", [merged, merged], name=f"{heads.name}.computed")
    stand_in(greater.outputs[0], merged)
    greater.outputs[0].name = greater.name
    graph.insert_after(last, greater)
    for reader in set(readers):
        for index, value in enumerate(reader.inputs):
            if value is merged and reader is not greater:
                reader.replace_input_with(index, greater.outputs[0])


def _insert(
    graph: ir.Graph,
    attention: ir.Node,
    op_type: str,
    part: str,
    inputs: Sequence[ir.Value | None],
    shape: list[int | ir.SymbolicDim],
    **attributes: int | list[int],
) -> ir.Value:
    """A part of an attention, before it and named after it."""
    name = f"{attention.outputs[0].name}.{part}"
    node = ir.node(op_type, inputs, attributes=attributes, name=name)
    graph.insert_before(attention, node)
    value = node.outputs[0]
    value.name, value.shape, value.dtype = name, ir.Shape(shape), ir.DataType.FLOAT
    return value
