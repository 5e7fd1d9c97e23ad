"""What a graph promises of its engine: inputs, caches, and weights, with what reads them."""

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from gemma_export.errors import EngineError, UsageError
from gemma_export.graphs.formats import TURING
from gemma_export.runtime.manifest import TensorSpec

_LAYOUT = frozenset({"Cast", "Identity", "Reshape", "Transpose"})
_TYPES = {
    ir.DataType.FLOAT: "Float",
    ir.DataType.FLOAT16: "Half",
    ir.DataType.BFLOAT16: "BFloat16",
    ir.DataType.INT8: "Int8",
    ir.DataType.INT4: "Int4",
}
"""TensorRT's own spelling."""
CODES = ("Int8", "Int4")
FLOATS = ("Float", "Half", "BFloat16")


@dataclass(frozen=True)
class WeightUse:
    """An operator that computes with a weight.

    Attributes:
        operator: The ONNX node's name.
        weight: The initializer's.
        count: How many numbers it has.
        type: As it is stored: `Half`, `BFloat16`, `Float`, `Int8` or `Int4`.
        codes: Whether the operator's other operand is rounded to codes too.
        lookup: Whether it looks rows up, and multiplies nothing.
        reshaped: Whether the operator's other operand comes out of a reshape as it is.
    """

    operator: str
    weight: str
    count: int
    type: str
    codes: bool = False
    lookup: bool = False
    reshaped: bool = False


@dataclass(frozen=True)
class CacheProduct:
    """A product of queries and keys, or of weights and values, where attention is no operator of its own.

    Attributes:
        operator: The ONNX node's name.
        cache: The cache output that it reads.
    """

    operator: str
    cache: str


@dataclass(frozen=True)
class EngineGraph:
    """A graph that is to be compiled.

    Attributes:
        file: Its file, beside its weights.
        inputs: Its inputs.
        caches: Names of its cache outputs, two a layer.
        slots: Of a cache row.
        uses: Of its weights.
        types: Of its inputs and weights, in TensorRT's spelling.
        attentions: How many attentions are one operator.
        products: Of the others, every product with a cache.
    """

    file: Path
    inputs: tuple[TensorSpec, ...]
    caches: tuple[str, ...]
    slots: int
    uses: tuple[WeightUse, ...]
    types: frozenset[str]
    attentions: int
    products: tuple[CacheProduct, ...] = ()


def read_graph(file: Path) -> EngineGraph:
    """Reads all of a bundle's graph but its weights.

    Raises:
        EngineError: It is no ONNX file, or not the graph of a decoder.
    """
    try:
        graph = ir.load(file).graph
    except (DecodeError, OSError, ValueError) as error:
        raise EngineError(
            f"{file} is no ONNX file that can be read: {error}.",
            "Build the bundle again, or fetch it again.",
        ) from error
    inputs = tuple(_spec(value) for value in graph.inputs)
    caches = [spec.shape for spec in inputs if len(spec.shape) == 4]
    if not caches or not isinstance(slots := caches[0][2], int) or len(graph.outputs) != 1 + len(caches):
        raise EngineError(
            f"{file} is not a decoder's graph: it has no cache of a fixed length.",
            "Give the bundle that `gemma-export build` wrote.",
        )
    values = (*graph.inputs, *graph.initializers.values())
    return EngineGraph(
        file,
        inputs,
        tuple(str(value.name) for value in graph.outputs[1:]),
        slots,
        tuple(_weight_uses(graph)),
        frozenset(_TYPES[value.dtype] for value in values if value.dtype in _TYPES),
        sum(node.op_type == "Attention" for node in graph),
        tuple(_cache_products(graph)),
    )


def check_codes(sms: Collection[int], uses: Sequence[WeightUse]) -> None:
    """Refuses SM 75 for a graph that was lowered for others: it would make numbers of codes in every step.

    Raises:
        UsageError: A product of codes reads what was only reshaped (`graphs.passes.keep_codes`).
    """
    for use in uses:
        if TURING in sms and use.type == "Int8" and use.reshaped and not use.codes:
            raise UsageError(
                f"SM {TURING} would make 16-bit numbers of all codes of {use.weight} in every step: this "
                "graph is spelled for other devices.",
                f"Build the bundle with --target rtx --sm {TURING}; others can compile that one too.",
            )


def _spec(value: ir.Value) -> TensorSpec:
    shape = () if value.shape is None else tuple(d if isinstance(d, int) else str(d) for d in value.shape)
    return TensorSpec(str(value.name), "" if value.dtype is None else value.dtype.name, shape)


def _cache_products(graph: ir.Graph) -> Iterator[CacheProduct]:
    """Every product with a cache, in the graph's order."""
    caches = set(graph.outputs[1:])
    for node in graph:
        for operand in node.inputs if node.op_type == "MatMul" else ():
            for step in _back(operand):
                if step in caches:
                    yield CacheProduct(str(node.name), str(step.name))


def _weight_uses(graph: ir.Graph) -> list[WeightUse]:
    """Every product with a stored matrix, and every lookup in one, in the graph's order."""
    uses = []
    for node in graph:
        if node.op_type in ("MatMul", "Gemm"):
            operands = [(node.inputs[1], node.inputs[0]), (node.inputs[0], node.inputs[1])]
        elif node.op_type == "Gather":
            operands = [(node.inputs[0], None)]
        else:
            continue
        for operand, other in operands:
            weight = _stored(operand)
            if weight is None or weight.shape is None or len(weight.shape) != 2 or weight.dtype not in _TYPES:
                continue
            count = math.prod(size for size in weight.shape if isinstance(size, int))
            uses.append(
                WeightUse(
                    operator=str(node.name),
                    weight=str(weight.name),
                    count=count,
                    type=_TYPES[weight.dtype],
                    codes=_is_rounded(other),
                    lookup=node.op_type == "Gather",
                    reshaped=_is_reshaped(other),
                )
            )
            break
    return uses


def _stored(value: ir.Value | None) -> ir.Value | None:
    """The initializer that a value is another form of."""
    for step in _back(value):
        if step.is_initializer():
            return step
    return None


def _is_rounded(value: ir.Value | None) -> bool:
    """Whether a value went through codes."""
    return any(
        (node := step.producer()) is not None and node.op_type == "DequantizeLinear" for step in _back(value)
    )


def _is_reshaped(value: ir.Value | None) -> bool:
    node = None if value is None else value.producer()
    return node is not None and node.op_type == "Reshape"


def _back(value: ir.Value | None) -> Iterator[ir.Value]:
    """A value and those it is another form of."""
    while value is not None:
        yield value
        node = value.producer()
        if node is None or node.op_type not in _LAYOUT | {"DequantizeLinear"}:
            return
        value = node.inputs[0]
