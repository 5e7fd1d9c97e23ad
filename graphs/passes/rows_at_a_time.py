"""Weights that are made numbers when they are used are made so in as few rows as that use needs.

    Gather(f(W), ids)                      →  f(Gather(W, ids))
    Gather(Transpose(f(W)), ids, axis 1)   →  Transpose(f(Gather(W, ids)))
    MatMul(x, Transpose(f(W)))             →  Concat(MatMul(x, Transpose(f(rows of W))), …)

where W is stored and f casts each number, or says what each code stands for with one scale for all. Whole,
Gemma's table in fp32 is 2 GB in the middle of every step. In rows that a core's cache holds, what is made is
multiplied before it goes to memory, which is most of what it costs.

A product is split where its weight has more than `most` numbers; its result is the same number by number.

Illegal, and left as it is, when what stands between W and its reader does more than that: a scale per block
or row, for one, would have to be split with it.
"""

import math

import onnx_ir as ir

from gemma_export.graphs.passes.patterns import scalar, stand_in
from gemma_export.graphs.passes.quantized_layers import add_constant, take_place

MOST_NUMBERS = 1 << 20
"""4 MiB in fp32."""


def rows_at_a_time(model: ir.Model, most: int = MOST_NUMBERS) -> int:
    """Rewrites lookups and large products of a graph; returns how many.

    Args:
        model: A graph whose stored weights have shapes.
        most: Numbers of a weight that are made at once.
    """
    graph = model.graph
    count = 0
    for node in list(graph):
        if node.op_type == "Gather" and (chain := _chain(node.inputs[0])):
            _look_up_first(graph, node, chain)
        elif node.op_type == "Gather" and (chain := _chain_of_view(node)):
            _look_up_first(graph, node, chain, turned=True)
        elif node.op_type == "MatMul" and (found := _large_product(node, most)) is not None:
            _split_product(graph, node, *found, most)
        else:
            continue
        count += 1
    return count


def _chain(value: ir.Value | None) -> list[ir.Node]:
    """The nodes that make a value of a stored matrix number by number, first to last, or none."""
    nodes: list[ir.Node] = []
    while value is not None and (node := value.producer()) is not None:
        if node.op_type != "Cast" and not _has_one_scale(node):
            return []
        nodes.insert(0, node)
        value = node.inputs[0]
    return nodes if _is_stored(value) else []


def _chain_of_view(lookup: ir.Node) -> list[ir.Node]:
    """The nodes that make the matrix whose columns are looked up, as a product reads it; or none."""
    view = None if lookup.inputs[0] is None else lookup.inputs[0].producer()
    if view is None or view.op_type != "Transpose" or lookup.attributes.get_int("axis", 0) != 1:
        return []
    ids = lookup.inputs[1]
    return _chain(view.inputs[0]) if ids is not None and ids.shape is not None and len(ids.shape) == 2 else []


def _has_one_scale(node: ir.Node) -> bool:
    if node.op_type != "DequantizeLinear" or (scale := node.inputs[1]) is None:
        return False
    cast = scale.producer()
    return scalar(scale if cast is None else cast.inputs[0]) is not None


def _is_stored(value: ir.Value | None) -> bool:
    return value is not None and value.is_initializer() and value.shape is not None and len(value.shape) == 2


def _copy(graph: ir.Graph, chain: list[ir.Node], value: ir.Value, before: ir.Node) -> ir.Value:
    """The chain once more, over another value."""
    for node in chain:
        like = node.outputs[0]
        copy = ir.node(node.op_type, [value, *node.inputs[1:]], attributes=node.attributes)
        output = copy.outputs[0]
        stand_in(output, like)
        output.name, output.shape = f"{value.name}.{like.name}", value.shape
        graph.insert_before(before, copy)
        value = output
    return value


def _look_up_first(graph: ir.Graph, lookup: ir.Node, chain: list[ir.Node], *, turned: bool = False) -> None:
    """Looks up [.., d] in what is stored; turned, the result is [d, ..]."""
    table, ids, found = chain[0].inputs[0], lookup.inputs[1], lookup.outputs[0]
    assert table is not None
    assert table.shape is not None
    assert ids is not None
    gather = ir.node("Gather", [table, ids])
    rows = gather.outputs[0]
    stand_in(rows, table)
    rows.name, rows.shape = f"{found.name}.rows", ir.Shape([*(ids.shape or ()), table.shape[1]])
    graph.insert_before(lookup, gather)
    numbers = _copy(graph, chain, rows, before=lookup)
    last = numbers.producer()
    if turned:
        last = ir.node("Transpose", [numbers], attributes={"perm": [2, 0, 1]})
        graph.insert_before(lookup, last)
    assert last is not None
    take_place(graph, lookup, last)


def _large_product(product: ir.Node, most: int) -> tuple[ir.Value, list[ir.Node]] | None:
    """The stored weight [N, K] of a product with more than `most` numbers, and what makes numbers of it."""
    operand = product.inputs[1]
    transpose = None if operand is None else operand.producer()
    if transpose is None or transpose.op_type != "Transpose":
        return None
    chain = _chain(transpose.inputs[0])
    weight = chain[0].inputs[0] if chain else None
    if weight is None or weight.shape is None or math.prod(weight.shape.numpy()) <= most:
        return None
    return weight, chain


def _split_product(
    graph: ir.Graph, product: ir.Node, weight: ir.Value, chain: list[ir.Node], most: int
) -> None:
    assert weight.shape is not None
    height, width = weight.shape.numpy()
    step = max(1, most // width)
    parts = []
    for start in range(0, height, step):
        stop = min(start + step, height)
        bounds = [add_constant(graph, f"row_{n}", [n], ir.DataType.INT64) for n in (start, stop)]
        axis = add_constant(graph, "axis_of_rows", [0], ir.DataType.INT64)
        cut = ir.node("Slice", [weight, *bounds, axis])
        rows = cut.outputs[0]
        stand_in(rows, weight)
        rows.name, rows.shape = f"{weight.name}.{start}.rows", ir.Shape([stop - start, width])
        graph.insert_before(product, cut)
        numbers = _copy(graph, chain, rows, before=product)
        transpose = ir.node("Transpose", [numbers], attributes={"perm": [1, 0]})
        part = ir.node("MatMul", [product.inputs[0], transpose.outputs[0]])
        graph.insert_before(product, [transpose, part])
        parts.append(part.outputs[0])
    concat = ir.node("Concat", parts, attributes={"axis": -1})
    graph.insert_before(product, concat)
    take_place(graph, product, concat)
