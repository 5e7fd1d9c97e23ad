"""Weights that are made numbers when they are used are made so in as few rows as that use needs.

    Gather(f(W), ids)                      →  f(Gather(W, ids))
    Gather(Transpose(f(W)), ids, axis 1)   →  Transpose(f(Gather(W, ids)))
    MatMul(x, Transpose(f(W)))             →  Concat(MatMul(x, Transpose(f(rows of W))), …)

where W lies in a file, and f casts each number, or says what each code stands for. Whole, Gemma's table in
fp32 is 2 GB in the middle of every step. In rows that a core's cache holds, what is made is multiplied before
it goes to memory, which is most of what it costs. Rows of W are a part of its file, and nothing is copied.

A product is split where its weight has more than `most` numbers; its result is the same number by number.

Illegal, and left as it is, when:
  (1) what stands between W and its reader does more than that, as a scale per row does;
  (2) W is looked up and has a scale per block: they would have to be looked up with it.
"""

import math

import onnx_ir as ir

from gemma_export.graphs.passes.patterns import scalar, stand_in
from gemma_export.graphs.passes.quantized_layers import take_place

MOST_NUMBERS = 1 << 20
"""4 MiB in fp32."""

Made = tuple[ir.Value, list[ir.Node]]
"""A stored matrix, and the nodes that make a value of it, first to last."""


def rows_at_a_time(model: ir.Model, most: int = MOST_NUMBERS) -> int:
    """Rewrites lookups and large products of a graph; returns how many.

    Args:
        model: A graph that was read from a file, with its weights beside it.
        most: Numbers of a weight that are made at once.
    """
    graph = model.graph
    count = 0
    for node in list(graph):
        if node.op_type == "Gather" and (made := _looked_up(node)) is not None:
            _look_up_first(graph, node, *made)
        elif node.op_type == "MatMul" and (made := _large_operand(node, most)) is not None:
            _split_product(graph, node, *made, most)
        else:
            continue
        count += 1
    return count


def _made(value: ir.Value | None) -> Made | None:
    """What a value is made of, where each row of it is made of the same row of a matrix in a file."""
    nodes: list[ir.Node] = []
    while value is not None and (node := value.producer()) is not None:
        if node.op_type != "Cast" and not _has_one_scale(node) and _scales_of_blocks(node) is None:
            return None
        nodes.insert(0, node)
        value = node.inputs[0]
    stored = None if value is None else value.const_value
    if value is None or not isinstance(stored, ir.ExternalTensor) or len(stored.shape) != 2:
        return None
    return value, nodes


def _has_one_scale(node: ir.Node) -> bool:
    if node.op_type != "DequantizeLinear" or (scale := node.inputs[1]) is None:
        return False
    cast = scale.producer()
    return scalar(scale if cast is None else cast.inputs[0]) is not None


def _scales_of_blocks(node: ir.Node) -> Made | None:
    """The stored scales [N, K / block] of a node that makes numbers of codes [N, K]."""
    if node.op_type != "DequantizeLinear" or any(value is not None for value in node.inputs[2:]):
        return None
    blocks, axis = node.attributes.get_int("block_size", 0), node.attributes.get_int("axis", 1)
    return _made(node.inputs[1]) if blocks > 0 and axis == 1 else None


def _looked_up(lookup: ir.Node) -> Made | None:
    """What a lookup looks up in: a table, or columns of the view of it that a product reads."""
    table, ids, axis = lookup.inputs[0], lookup.inputs[1], lookup.attributes.get_int("axis", 0)
    if axis == 1 and ids is not None and ids.shape is not None and len(ids.shape) == 2:
        table = _transposed(table)
    elif axis != 0:
        return None
    made = _made(table)
    if made is None or not made[1] or any(_scales_of_blocks(node) is not None for node in made[1]):
        return None
    return made


def _large_operand(product: ir.Node, most: int) -> Made | None:
    """The weight [N, K] of a product, where it has more than `most` numbers."""
    made = _made(_transposed(product.inputs[1]))
    if made is None or not made[1] or math.prod(_sizes(made[0])) <= most:
        return None
    return made


def _transposed(value: ir.Value | None) -> ir.Value | None:
    """What a value is the transpose of."""
    node = None if value is None else value.producer()
    return node.inputs[0] if node is not None and node.op_type == "Transpose" else None


def _sizes(stored: ir.Value) -> tuple[int, int]:
    assert stored.const_value is not None
    rows, columns = stored.const_value.shape.numpy()
    return rows, columns


def _look_up_first(graph: ir.Graph, lookup: ir.Node, table: ir.Value, nodes: list[ir.Node]) -> None:
    """Looks up [.., d] in what is stored; where columns were looked up, the result is [d, ..]."""
    ids, found = lookup.inputs[1], lookup.outputs[0]
    assert ids is not None
    gather = ir.node("Gather", [table, ids])
    rows = gather.outputs[0]
    stand_in(rows, table)
    rows.name, rows.shape = f"{found.name}.rows", ir.Shape([*(ids.shape or ()), _sizes(table)[1]])
    graph.insert_before(lookup, gather)
    numbers = rows
    for node in nodes:
        numbers = _copy(graph, node, [numbers, *node.inputs[1:]], before=lookup)
    last = numbers.producer()
    if lookup.attributes.get_int("axis", 0) == 1:
        last = ir.node("Transpose", [numbers], attributes={"perm": [2, 0, 1]})
        graph.insert_before(lookup, last)
    assert last is not None
    take_place(graph, lookup, last)


def _split_product(
    graph: ir.Graph, product: ir.Node, weight: ir.Value, nodes: list[ir.Node], most: int
) -> None:
    height, width = _sizes(weight)
    step = max(1, most // width)
    parts = []
    for start in range(0, height, step):
        numbers = _in_rows(graph, weight, nodes, start, min(start + step, height), before=product)
        transpose = ir.node("Transpose", [numbers], attributes={"perm": [1, 0]})
        part = ir.node("MatMul", [product.inputs[0], transpose.outputs[0]])
        graph.insert_before(product, [transpose, part])
        parts.append(part.outputs[0])
    concat = ir.node("Concat", parts, attributes={"axis": -1})
    graph.insert_before(product, concat)
    take_place(graph, product, concat)


def _in_rows(
    graph: ir.Graph, stored: ir.Value, nodes: list[ir.Node], start: int, stop: int, before: ir.Node
) -> ir.Value:
    """What the nodes make of rows [start, stop) of a stored matrix."""
    value = _part(graph, stored, start, stop)
    for node in nodes:
        inputs = [value, *node.inputs[1:]]
        if (scales := _scales_of_blocks(node)) is not None:
            inputs[1] = _in_rows(graph, *scales, start, stop, before)
        value = _copy(graph, node, inputs, before)
    return value


def _part(graph: ir.Graph, stored: ir.Value, start: int, stop: int) -> ir.Value:
    """Rows [start, stop) of a matrix in a file, as a part of that file."""
    whole = stored.const_value
    assert isinstance(whole, ir.ExternalTensor)
    row = _sizes(stored)[1] * whole.dtype.bitwidth // 8
    name = f"{stored.name}.{start}.rows"
    shape = ir.Shape([stop - start, _sizes(stored)[1]])
    rows = ir.ExternalTensor(
        whole.location,
        (whole.offset or 0) + start * row,
        (stop - start) * row,
        whole.dtype,
        shape=shape,
        name=name,
        base_dir=whole.base_dir,
    )
    part = ir.Value(name=name, shape=shape, type=ir.TensorType(whole.dtype), const_value=rows)
    graph.register_initializer(part)
    return part


def _copy(graph: ir.Graph, node: ir.Node, inputs: list[ir.Value | None], before: ir.Node) -> ir.Value:
    """A node once more, over other values."""
    copy = ir.node(node.op_type, inputs, attributes=node.attributes)
    first, output = inputs[0], copy.outputs[0]
    assert first is not None
    stand_in(output, node.outputs[0])
    output.name, output.shape = f"{first.name}.{node.outputs[0].name}", first.shape
    graph.insert_before(before, copy)
    return output
