"""For a target with 16-bit arithmetic: every value is 16 bits wide but for islands in fp32.

Each operator gets one format; values that cross between two are cast, once each. In fp32 stay:

- what always must: norms, rotations, the activation (in fp16 tanh-GELU flips answers), soft-caps, a softmax
  outside an attention, the scaled embedding and the residual stream, whose growth over the layers is what
  leaves fp16 first;
- what rounds activations to 8 bits: a quotient in the middle between two codes needs the digits;
- whatever `keep` names, the range audit's findings, and what reads it: cast to 16 bits on its way into the
  next operator, a value that leaves the range would be infinite there.

A cache has the format of the contract: keys or values that leave it cannot be kept, and parity says so.

An operator that only moves numbers has the format of what it moves, and a cast the one it says. Weights of an
operator in an island are still stored in 16 bits and cast where they are used, unless they themselves are
named; gains and rotary tables feed islands only and stay fp32. A mask has the format of what reads it, with
that format's own minimum: cast, fp32's would turn into -inf.

Codes are what they are; the numbers they stand for (DequantizeLinear) are 16 bits wide, unless everything
that reads them is an island: no weight is made wide in memory by a cast.
"""

from collections.abc import Collection, Iterator

import onnx_ir as ir
import torch

from gemma_export.errors import GraphError
from gemma_export.graphs.passes.patterns import users
from gemma_export.graphs.tensors import IR_DTYPES, TORCH_DTYPES, StreamedTensor, in_format, streamed

ALWAYS_FP32 = frozenset(
    {"RMSNormalization", "RotaryEmbedding", "Gelu", "Add", "Sub", "Div", "Tanh", "Softmax"}
)
"""Operators that are islands. Every Add is one of the residual stream, or of scores and their mask; every Sub
one of codes looked up."""

NEVER_FP32 = frozenset({"GroupQueryAttention"})
"""Operators that no device computes in fp32."""

MOVES = frozenset({"Concat", "Gather", "Reshape", "Transpose", "Split", "Slice", "Unsqueeze"})
"""Operators that compute nothing."""

PASSES_ON = (
    {"Cast": 1, "QuantizeLinear": 2, "DequantizeLinear": 2}
    | dict.fromkeys(MOVES - {"Gather"}, 1)
    | {"Concat": None}
)
"""Operators whose result leaves the range where their first operands do: how many of them; None for all."""

FLOATS = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16})


def half_precision(model: ir.Model, dtype: torch.dtype, keep: Collection[str] = ()) -> int:
    """Rewrites the canonical graph to compute in `dtype`; returns how many operators now do.

    Args:
        model: The canonical graph, in fp32.
        dtype: float16 or bfloat16.
        keep: Names of values (as `name_values` gives them) whose operators stay in fp32, and of initializers
            that also are stored so.

    Raises:
        GraphError: An operator that has to stay in fp32 cannot.
    """
    graph, half = model.graph, IR_DTYPES[dtype]
    _store_weights(graph, dtype, keep)
    for cache in (*graph.inputs[2:], *graph.outputs[1:]):
        cache.dtype = half
    formats = _Formats(graph)
    count = 0
    for node in list(graph):
        rounds = node.op_type == "QuantizeLinear"
        if node.op_type in ("Constant", "Cast") or not (rounds or _is_float(node.outputs[0])):
            continue
        if node.op_type in MOVES:
            assert node.inputs[0] is not None
            target = node.inputs[0].dtype
        else:
            target = ir.DataType.FLOAT if rounds or _is_island(node, keep) else half
            if target != half and node.op_type in NEVER_FP32:
                raise GraphError(
                    f"{node.outputs[0].name} or what it reads leaves the range of fp16, and no device has a "
                    f"{node.op_type} in fp32.",
                    "Build it with --precision bf16, which has the range of fp32, or with --target onnx.",
                )
            count += target == half
        assert target is not None
        for index, operand in enumerate(node.inputs):
            if operand is not None and _is_float(operand):
                node.replace_input_with(index, formats.cast(operand, target, before=node))
        for output in node.outputs:
            if _is_float(output):
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
        if (
            tensor is not None
            and value.dtype == ir.DataType.FLOAT
            and not _feeds_islands(value)
            and value.name not in keep
        ):
            value.const_value = StreamedTensor(in_format(tensor.source, dtype), name=value.name)
            value.dtype = IR_DTYPES[dtype]


def _is_float(value: ir.Value) -> bool:
    return value.dtype in FLOATS


def _feeds_islands(value: ir.Value) -> bool:
    """Whether an initializer is a gain or a rotary table: a thousandth of the bytes, read in fp32 only."""
    return all(node.op_type in ALWAYS_FP32 for node in users(value))


def _is_island(node: ir.Node, keep: Collection[str]) -> bool:
    if node.op_type in ALWAYS_FP32 or any(output.name in keep for output in node.outputs):
        return True
    if node.op_type == "TensorScatter":
        return False  # The cache's format is the contract's, whatever is written.
    read = [origin for operand in node.inputs if operand is not None for origin in _origins(operand)]
    if any(value.name in keep for value in read):
        return True
    if node.op_type in ("DequantizeLinear", "Where"):
        return all(_is_island(reader, keep) for reader in _readers(node.outputs[0]))
    if node.op_type != "Mul":
        return False
    finishes = [operand.producer() for operand in node.inputs if operand is not None]
    return any(_is_looked_up(value) for value in read) or any(
        product is not None
        and (product.op_type == "Tanh" or (product.op_type == "MatMul" and _is_island(product, keep)))
        for product in finishes
    )


def _origins(value: ir.Value) -> Iterator[ir.Value]:
    """The values that a value says again: those before casts, rounding, and what only moves numbers about."""
    producer = value.producer()
    if producer is None or producer.op_type not in PASSES_ON:
        yield value
        return
    for operand in producer.inputs[: PASSES_ON[producer.op_type]]:
        if operand is not None:
            yield from _origins(operand)


def _readers(value: ir.Value) -> Iterator[ir.Node]:
    """The nodes that compute with a value, seen through what only moves it about."""
    for node in users(value):
        if node.op_type in MOVES:
            for output in node.outputs:
                yield from _readers(output)
        else:
            yield node


def _is_looked_up(value: ir.Value) -> bool:
    """Whether a value is rows of the embedding table, or those times something."""
    producer = value.producer()
    if producer is None or producer.op_type != "Mul":
        return producer is not None and producer.op_type == "Gather"
    factors = [origin for operand in producer.inputs if operand is not None for origin in _origins(operand)]
    return any(_is_looked_up(factor) for factor in factors)


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
