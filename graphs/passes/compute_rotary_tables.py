"""For onnxruntime: the rotary tables are computed when the graph is loaded, and are not stored.

    cos [S, h/2]  →  Cos(Unsqueeze(Range(0, S, 1), 1) · frequencies [h/2])         and sin likewise

All of it is constant, so onnxruntime evaluates it once, while it loads. Beside the 8-bit weights of the 2B
model, tables for 8192 positions would be a third of a percent. An angle is the same fp32 product as in the
stored table, so it is rounded as the reference implementations round it.

Illegal when a table is not made of frequencies, or the two are not of the same ones.
"""

from collections.abc import Callable

import onnx_ir as ir
import torch

from gemma_export.graphs.passes.quantized_layers import add_constant
from gemma_export.graphs.tensors import InMemory, RotaryTable, add_initializer, streamed

FUNCTIONS: dict[Callable[[torch.Tensor], torch.Tensor], str] = {torch.cos: "Cos", torch.sin: "Sin"}
"""The operator of each function that a table may hold."""


def compute_rotary_tables(model: ir.Model) -> int:
    """Replaces the stored tables; returns how many (2: cosines and sines)."""
    graph = model.graph
    found = [
        (value, tensor.source)
        for value in graph.initializers.values()
        if (tensor := streamed(value)) is not None
        and isinstance(tensor.source, RotaryTable)
        and tensor.source.function in FUNCTIONS
    ]
    if not found:
        return 0
    table = found[0][1]
    if any(
        other.slots != table.slots or not torch.equal(other.frequencies, table.frequencies)
        for _, other in found
    ):
        return 0
    angles = _angles(graph, table)
    for value, source in found:
        node = ir.node(FUNCTIONS[source.function], [angles.outputs[0]])
        computed = node.outputs[0]
        computed.shape, computed.dtype = ir.Shape(source.shape), ir.DataType.FLOAT
        graph.insert_after(angles, node)
        value.replace_all_uses_with(computed)
        name = str(value.name)
        del graph.initializers[name]
        computed.name = name
    return len(found)


def _angles(graph: ir.Graph, table: RotaryTable) -> ir.Node:
    """Position · frequency, fp32 [S, h/2], at the beginning of the graph."""
    frequencies = add_initializer(
        graph, "rotary_frequencies", InMemory("rotary_frequencies", table.frequencies)
    )
    first, last, step = (
        add_constant(graph, f"rotary_{name}", number)
        for name, number in (("first", 0.0), ("last", float(table.slots)), ("step", 1.0))
    )
    axis = add_constant(graph, "rotary_axis", [1], ir.DataType.INT64)
    positions = ir.node("Range", [first, last, step])
    column = ir.node("Unsqueeze", [positions.outputs[0], axis])
    product = ir.node("Mul", [column.outputs[0], frequencies])
    shapes = ((table.slots,), (table.slots, 1), table.shape)
    for node, shape, name in zip(
        (positions, column, product), shapes, ("positions", "column", "angles"), strict=True
    ):
        node.outputs[0].shape, node.outputs[0].dtype = ir.Shape(shape), ir.DataType.FLOAT
        node.outputs[0].name = f"rotary_{name}"
    graph.insert_before(graph[0], [positions, column, product])
    return product
