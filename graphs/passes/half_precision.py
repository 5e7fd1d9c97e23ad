"""For a target with 16-bit arithmetic: every value is 16 bits wide but for islands in fp32.

Each operator gets one format; values that cross between two are cast, once each. In fp32 stay:

- what always must: norms, rotations, the activation (in fp16 tanh-GELU flips answers), the scaled
  embedding and the residual stream, whose growth over the layers is what leaves fp16 first;
- whatever `keep` names, the range audit's findings, and what reads it: cast to 16 bits on its way into the
  next operator, a value that leaves the range would be infinite there.

A cache has the format of the contract: keys or values that leave it cannot be kept, and parity says so.

An operator that only moves numbers has the format of what it moves. Weights of an operator in an island are
still stored in 16 bits and cast where they are used, unless they themselves are named; gains and rotary
tables feed islands only and stay fp32. The mask's minimum becomes the format's own: cast, fp32's minimum
would turn into -inf.
"""

from collections.abc import Collection

import onnx_ir as ir
import torch

from gemma_export.graphs.passes.store_half import is_weight_matrix
from gemma_export.graphs.tensors import IR_DTYPES, TORCH_DTYPES, StreamedTensor, in_format, streamed

ALWAYS_FP32 = frozenset({"RMSNormalization", "RotaryEmbedding", "Gelu", "Add"})
"""Operators that are islands. Every Add of the canonical graph is one of the residual stream."""

MOVES = frozenset({"Gather", "Reshape", "Transpose", "Split", "Slice"})
"""Operators that compute nothing."""

PASSES_ON = (MOVES - {"Gather"}) | {"Cast"}
"""Operators whose first operand's numbers are their result's: the name of the one is that of the other."""

FLOATS = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16})


def half_precision(model: ir.Model, dtype: torch.dtype, keep: Collection[str] = ()) -> int:
    """Rewrites the canonical graph to compute in `dtype`; returns how many operators now do.

    Args:
        model: The canonical graph, in fp32.
        dtype: float16 or bfloat16.
        keep: Names of values (as `name_values` gives them) whose operators stay in fp32, and of initializers
            that also are stored so.
    """
    graph, half = model.graph, IR_DTYPES[dtype]
    _store_weights(graph, dtype, keep)
    for cache in (*graph.inputs[2:], *graph.outputs[1:]):
        cache.dtype = half
    formats = _Formats(graph)
    count = 0
    for node in list(graph):
        if node.op_type == "Constant" or not _is_float(node.outputs[0]):
            continue
        if node.op_type in MOVES:
            assert node.inputs[0] is not None
            target = node.inputs[0].dtype
        else:
            target = ir.DataType.FLOAT if _is_island(node, keep) else half
            count += target == half
        assert target is not None
        for index, operand in enumerate(node.inputs):
            if operand is not None and _is_float(operand):
                node.replace_input_with(index, formats.cast(operand, target, before=node))
        for output in node.outputs:
            output.dtype = target
    logits = graph.outputs[0]
    if logits.dtype != ir.DataType.FLOAT:
        _cast_output(graph, logits)
    return count


class _Formats:
    """The cast of each value to each format, made at its first use."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._casts: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}

    def cast(self, value: ir.Value, dtype: ir.DataType, *, before: ir.Node) -> ir.Value:
        if value.dtype == dtype:
            return value
        key = (value, dtype)
        if key not in self._casts:
            small = self._constant(value, dtype)
            self._casts[key] = small if small is not None else self._node(value, dtype, before)
        return self._casts[key]

    def _constant(self, value: ir.Value, dtype: ir.DataType) -> ir.Value | None:
        """A constant in the other format, kept within that format's finite range."""
        if not value.is_initializer() or value.const_value is None or streamed(value) is not None:
            return None
        limits = torch.finfo(TORCH_DTYPES[dtype])
        numbers = torch.from_numpy(value.const_value.numpy().copy()).clamp(limits.min, limits.max)
        name = f"{value.name}.{dtype.name.lower()}"
        tensor = ir.tensor(numbers.to(TORCH_DTYPES[dtype]), name=name)
        constant = ir.Value(name=name, shape=value.shape, type=ir.TensorType(dtype), const_value=tensor)
        self._graph.register_initializer(constant)
        return constant

    def _node(self, value: ir.Value, dtype: ir.DataType, before: ir.Node) -> ir.Value:
        cast = ir.node("Cast", [value], attributes={"to": dtype})
        output = cast.outputs[0]
        output.name, output.shape, output.dtype = f"{value.name}.{dtype.name.lower()}", value.shape, dtype
        self._graph.insert_before(before, cast)
        return output


def _store_weights(graph: ir.Graph, dtype: torch.dtype, keep: Collection[str]) -> None:
    for value in graph.initializers.values():
        tensor = streamed(value)
        if tensor is not None and is_weight_matrix(value) and value.name not in keep:
            value.const_value = StreamedTensor(in_format(tensor.source, dtype), name=value.name)
            value.dtype = IR_DTYPES[dtype]


def _is_float(value: ir.Value) -> bool:
    return value.dtype in FLOATS


def _is_island(node: ir.Node, keep: Collection[str]) -> bool:
    if node.op_type in ALWAYS_FP32 or any(output.name in keep for output in node.outputs):
        return True
    if node.op_type == "TensorScatter":
        return False  # The cache's format is the contract's, whatever is written.
    read = [_moved_from(operand) for operand in node.inputs if operand is not None]
    scales_embedding = node.op_type == "Mul" and any(_is_looked_up(value) for value in read)
    return scales_embedding or any(value.name in keep for value in read)


def _moved_from(value: ir.Value) -> ir.Value:
    """The value before casts, and before what only moves numbers about."""
    producer = value.producer()
    if producer is not None and producer.op_type in PASSES_ON and producer.inputs[0] is not None:
        return _moved_from(producer.inputs[0])
    return value


def _is_looked_up(value: ir.Value) -> bool:
    producer = value.producer()
    return producer is not None and producer.op_type == "Gather"


def _cast_output(graph: ir.Graph, value: ir.Value) -> None:
    """Makes a graph output fp32: the contract's logits."""
    producer = value.producer()
    assert producer is not None
    cast = ir.node("Cast", [value], attributes={"to": ir.DataType.FLOAT})
    output = cast.outputs[0]
    output.shape, output.dtype = value.shape, ir.DataType.FLOAT
    value.replace_all_uses_with(output, replace_graph_outputs=True)
    cast.replace_input_with(0, value)
    output.name, value.name = value.name, f"{value.name}.half"
    graph.insert_after(producer, cast)
