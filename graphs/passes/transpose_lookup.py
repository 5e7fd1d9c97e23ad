"""For TensorRT: a table of codes is looked up in the view that the head multiplies with.

    Gather(DQ(codes) [V, d], ids), MatMul(x, Transpose(DQ(codes)))
        →  Transpose(Gather(E, ids, axis 1)), MatMul(x, E)   with E = Transpose(DQ(codes)) [d, V]

Looked up as it is stored, the table is laid out for its rows, and the head of an engine with a profile for
several rows wants a layout of its own: a fifth of the 2B model is then stored twice. Nothing is transposed
but the rows that were looked up.

Illegal when:
  (1) the table is of numbers: this is the spelling that stores those twice;
  (2) the ids have an axis for the batch;
  (3) no head reads the table.
"""

import onnx_ir as ir

from gemma_export.graphs.passes.patterns import stand_in, users
from gemma_export.graphs.tensors import streamed


def transpose_lookup(model: ir.Model) -> int:
    """Rewrites the lookup of every table of codes; returns how many."""
    lookups = [(node, view) for node in model.graph if (view := _view(node)) is not None]
    for lookup, view in lookups:
        _look_up_in(model.graph, lookup, view)
    return len(lookups)


def _view(lookup: ir.Node) -> ir.Value | None:
    """The transposed table [d, V] that the head multiplies with, where a node looks up in codes; or None."""
    if lookup.op_type != "Gather" or lookup.attributes.get_int("axis", 0) != 0:
        return None
    table, ids = lookup.inputs
    numbers = None if table is None else table.producer()
    if table is None or numbers is None or numbers.op_type != "DequantizeLinear":
        return None
    if streamed(numbers.inputs[0]) is None or ids is None or ids.shape is None:
        return None
    if len(ids.shape) != 2 or ids.shape[0] != 1:
        return None
    views = [node.outputs[0] for node in users(table) if node.op_type == "Transpose"]
    return next((view for view in views if any(node.op_type == "MatMul" for node in users(view))), None)


def _look_up_in(graph: ir.Graph, lookup: ir.Node, view: ir.Value) -> None:
    rows, transpose = lookup.outputs[0], view.producer()
    assert transpose is not None
    assert rows.shape is not None
    gather = ir.node("Gather", [view, lookup.inputs[1]], attributes={"axis": 1}, name=lookup.name)
    upright = ir.node("Transpose", [gather.outputs[0]], attributes={"perm": [1, 2, 0]})
    columns = gather.outputs[0]
    stand_in(upright.outputs[0], rows)
    columns.name, columns.shape = (
        f"{rows.name}.columns",
        ir.Shape([rows.shape[2], rows.shape[0], rows.shape[1]]),
    )
    if rows.dtype is not None:
        columns.dtype = rows.dtype
    # The view is made where the head is: now it is read at the beginning too.
    graph.remove(transpose)
    graph.insert_before(lookup, [transpose, gather, upright])
    rows.replace_all_uses_with(upright.outputs[0])
    graph.remove(lookup, safe=True)
