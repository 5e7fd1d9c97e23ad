"""What the quantizing passes for onnxruntime share: names, what was chosen for them, and MatMulNBits.

Source: onnxruntime `docs/ContribOperators.md`, com.microsoft.MatMulNBits.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir

from gemma_export.errors import GraphError
from gemma_export.graphs.formats import WeightFormat
from gemma_export.graphs.passes.patterns import stand_in
from gemma_export.graphs.quantization import LinearQuantization
from gemma_export.graphs.quantized import BlockScales, PackedBlocks, QuantizedWeight, quantized
from gemma_export.graphs.spec import MICROSOFT
from gemma_export.graphs.tensors import RowSource, add_initializer, streamed

ROUNDS_X = 4
"""An accuracy level of MatMulNBits: x is rounded to 8 bits, and the products are those of integers."""

TAKES_X = 0
"""Another: codes become numbers of x's format. A GPU's kernels know no other."""

BITS = {"w8": 8, "w4": 4}
"""Of the forms whose weights MatMulNBits reads."""

BLOCK_SIZES = (16, 32, 64, 128, 256)
"""Columns that may share a scale in MatMulNBits."""

CALIBRATE = "The scales belong to another model or target: calibrate again."


def lookup_tables(graph: ir.Graph) -> dict[ir.Value, ir.Node]:
    """Stored tables by the lookup that reads them: of a Gemma, the embedding's."""
    return {
        node.inputs[0]: node
        for node in graph
        if node.op_type == "Gather" and node.inputs[0] is not None and streamed(node.inputs[0]) is not None
    }


def layer_name(weight: ir.Value) -> str:
    """A linear layer's name, or the table's, by its weight."""
    return str(weight.name).removesuffix(".weight")


def chosen(linears: Mapping[str, LinearQuantization], name: str) -> LinearQuantization:
    """How a layer is quantized.

    Raises:
        GraphError: Nothing says it.
    """
    if name not in linears:
        raise GraphError(f"Nothing says how {name} is quantized.", CALIBRATE)
    return linears[name]


@dataclass(frozen=True)
class StoredBlocks:
    """A weight in blocks as initializers: codes uint8 [N, G, b · bits / 8] and scales bfloat16 [N, G]."""

    weight: QuantizedWeight
    codes: ir.Value
    scales: ir.Value

    def insert_product(self, graph: ir.Graph, before: ir.Node, x: ir.Value, accuracy_level: int) -> ir.Node:
        """Puts the product of x [.., K] with the transpose of the weight before a node: [.., N].

        Scales are fp32 there. onnxruntime makes them so once for all, when it loads the graph, and has to:
        1.31 packs codes without scales that are no constants, and all products are then zeros. So this graph
        is not for a session that has constant folding disabled.
        """
        rows, columns = self.weight.codes.shape
        assert self.weight.format.block is not None
        wide = ir.node("Cast", [self.scales], attributes={"to": ir.DataType.FLOAT})
        scales = wide.outputs[0]
        scales.name, scales.shape = f"{self.scales.name}.fp32", self.scales.shape
        scales.dtype, wide.name = ir.DataType.FLOAT, scales.name
        product = ir.node(
            "MatMulNBits",
            [x, self.codes, scales],
            attributes={
                "K": columns,
                "N": rows,
                "bits": self.weight.format.bits,
                "block_size": self.weight.format.block,
                "accuracy_level": accuracy_level,
            },
            domain=MICROSOFT,
        )
        graph.insert_before(before, [wide, product])
        return product


def add_blocks(graph: ir.Graph, name: str, source: RowSource, how: LinearQuantization) -> StoredBlocks:
    """Initializers of a weight [N, K] that MatMulNBits is to read.

    Raises:
        GraphError: It does not know the format, or the blocks do not divide the rows.
    """
    form = how.format
    if how.form not in BITS:
        raise GraphError(f"{name} cannot be {how.form} for onnxruntime.", CALIBRATE)
    if form is None or form.bits != BITS[how.form] or form.block not in BLOCK_SIZES:
        raise GraphError(
            f"{name} cannot be {how.form} with {described(form)} for onnxruntime.",
            f"Choose blocks of {', '.join(map(str, BLOCK_SIZES))} columns and {BITS[how.form]} bits.",
        )
    weight = quantized(source, how)
    codes = add_initializer(graph, f"{name}.codes", PackedBlocks(weight))
    return StoredBlocks(weight, codes, add_initializer(graph, f"{name}.scales", BlockScales(weight)))


def add_constant(
    graph: ir.Graph, name: str, numbers: float | list[int], dtype: ir.DataType = ir.DataType.FLOAT
) -> ir.Value:
    """A small constant: the one of that name where there is one already."""
    if name not in graph.initializers:
        tensor = ir.tensor(numbers, dtype=dtype, name=name)
        graph.register_initializer(
            ir.Value(
                name=name, shape=ir.Shape(tensor.shape.numpy()), type=ir.TensorType(dtype), const_value=tensor
            )
        )
    return graph.initializers[name]


def take_place(graph: ir.Graph, old: ir.Node, new: ir.Node) -> None:
    """Puts a node, which is in the graph already, in the place of another, which goes."""
    output, replaced = new.outputs[0], old.outputs[0]
    stand_in(output, replaced)
    new.name = output.name
    replaced.replace_all_uses_with(output, replace_graph_outputs=True)
    replaced.name = f"{output.name}.replaced"
    graph.remove(old, safe=True)


def described(form: WeightFormat | None) -> str:
    """A format of weights, for a message."""
    if form is None:
        return "no format"
    return f"{form.bits} bits and {'a scale per row' if form.block is None else f'blocks of {form.block}'}"
