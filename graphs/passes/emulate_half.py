"""A graph that computes in 16 bits becomes one that computes in fp32 and rounds where the first would.

    y₁₆ = op(x₁₆)   →   y = Cast(Cast(op(x), 16 bits), fp32)

A CPU has no 16-bit products, and onnxruntime's way around it (casts that it then removes) shows less error
than a device makes; bfloat16 it does not run at all. This twin runs everywhere and has a device's rounding:
operands and results of every operator in 16 bits, sums inside it in fp32, as tensor cores do. It is what
parity is measured on where the bundle's own graph needs a GPU.

Operators that only move numbers need no rounding, and caches stay between the operator and the graph's edge.

Rounding to 8 bits is done as the graph says. What it gives has no rounding to 16 bits on top: a device
multiplies the codes, and their scale in fp32 with the sum. Weights that are stored as codes have it, since a
device makes 16-bit numbers of them; it also stops onnxruntime from fusing the product with them into one that
rounds activations as well.
"""

import onnx_ir as ir

from gemma_export.graphs.passes.half_precision import MOVES

HALVES = frozenset({ir.DataType.FLOAT16, ir.DataType.BFLOAT16})
FLOATS = HALVES | {ir.DataType.FLOAT}
EXACT = MOVES | {"TensorScatter"}


def emulate_half(model: ir.Model) -> int:
    """Rewrites a graph that computes in 16 bits; returns how many values are rounded."""
    graph = model.graph
    for value in (*graph.inputs, *graph.outputs):
        if value.dtype in HALVES:
            value.dtype = ir.DataType.FLOAT
    for value in list(graph.initializers.values()):
        if value.dtype in HALVES:
            _widen(graph, value)
    count = 0
    for node in list(graph):
        if node.op_type == "Cast":
            count += _rounds(graph, node)
            continue
        half = [(output, output.dtype) for output in node.outputs if output.dtype in HALVES]
        for output, dtype in half:
            output.dtype = ir.DataType.FLOAT
            if (
                node.op_type not in EXACT
                and not _dequantizes_activation(node)
                and not output.is_graph_output()
            ):
                _round(graph, output, dtype, node)
                count += 1
    return count


def _dequantizes_activation(node: ir.Node) -> bool:
    """Whether a node says what codes of an activation, and not of a weight, stand for."""
    codes = node.inputs[0] if node.op_type == "DequantizeLinear" else None
    producer = None if codes is None else codes.producer()
    return producer is not None and producer.op_type == "QuantizeLinear"


def _widen(graph: ir.Graph, weight: ir.Value) -> None:
    """Casts a stored weight or constant to fp32 for each that reads it, just before it does."""
    for index, use in enumerate(list(weight.uses())):
        cast = ir.node("Cast", [weight], attributes={"to": ir.DataType.FLOAT})
        output = cast.outputs[0]
        output.name, output.shape, output.dtype = (
            f"{weight.name}.wide.{index}",
            weight.shape,
            ir.DataType.FLOAT,
        )
        cast.name = output.name
        cast.metadata_props["exact"] = "1"
        graph.insert_before(use.node, cast)
        use.node.replace_input_with(use.idx, output)


def _rounds(graph: ir.Graph, cast: ir.Node) -> int:
    """A cast to 16 bits becomes a rounding; one from 16 bits has nothing left to do. Returns roundings."""
    operand, output = cast.inputs[0], cast.outputs[0]
    if cast.metadata_props.get("exact") or operand is None:
        return 0
    if output.dtype not in HALVES:
        widens = output.dtype == ir.DataType.FLOAT and operand.dtype in FLOATS
        if widens and not output.is_graph_output():
            output.replace_all_uses_with(operand)
            graph.remove(cast, safe=True)
        return 0
    _append_widening(graph, output, cast)
    return 1


def _round(graph: ir.Graph, value: ir.Value, dtype: ir.DataType, after: ir.Node) -> None:
    """Rounds a value for all that read it."""
    users = [(use.node, use.idx) for use in value.uses()]
    narrow = ir.node("Cast", [value], attributes={"to": dtype})
    narrow.outputs[0].name, narrow.outputs[0].shape = f"{value.name}.narrow", value.shape
    narrow.outputs[0].dtype = dtype
    graph.insert_after(after, narrow)
    for node, index in users:
        node.replace_input_with(index, narrow.outputs[0])
    _append_widening(graph, narrow.outputs[0], narrow)


def _append_widening(graph: ir.Graph, narrow: ir.Value, after: ir.Node) -> None:
    users = [(use.node, use.idx) for use in narrow.uses()]
    widen = ir.node("Cast", [narrow], attributes={"to": ir.DataType.FLOAT})
    widen.metadata_props["exact"] = "1"
    output = widen.outputs[0]
    output.name, output.shape, output.dtype = f"{narrow.name}.rounded", narrow.shape, ir.DataType.FLOAT
    graph.insert_after(after, widen)
    for node, index in users:
        node.replace_input_with(index, output)
