"""What the quantizing passes for onnxruntime share: names, what was chosen for them, and MatMulNBits.

Source: onnxruntime `docs/ContribOperators.md`, com.microsoft.MatMulNBits.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir

from gemma_export.errors import GraphError
from gemma_export.graphs.formats import BLOCK_SIZES, WeightFormat
from gemma_export.graphs.passes.patterns import stand_in
from gemma_export.graphs.quantization import LinearQuantization
from gemma_export.graphs.quantized import GroupScales, PackedBlocks, QuantizedWeight, quantized
from gemma_export.graphs.spec import MICROSOFT
from gemma_export.graphs.tensors import RowSource, add_initializer, streamed

ROUNDS_X = 4
"""An accuracy level of MatMulNBits: x is rounded to 8 bits, and the products are those of integers."""

TAKES_X = 0
"""Another: codes become numbers of x's format. A GPU's kernels know no other."""

BITS = {"w8": 8, "w4": 4}
"""Of the forms whose weights MatMulNBits reads."""

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
    """A weight in blocks of b columns as initializers: codes and scales.

    Attributes:
        weight: What they are of.
        codes: uint8 [N, K / b, b · bits / 8].
        scales: bfloat16 [N, K / b] or, where the blocks of a row share one, fp32 [N, 1].
    """

    weight: QuantizedWeight
    codes: ir.Value
    scales: ir.Value

    def insert_product(self, graph: ir.Graph, before: ir.Node, x: ir.Value, accuracy_level: int) -> ir.Node:
        """Puts the product of x [.., K] with the transpose of the weight before a node: [.., N].

        Scales are fp32 there, one for each block. onnxruntime makes them so once for all, when it loads the
        graph, and has to: 1.31 packs codes without scales that are no constants, and all products are then
        zeros. So this graph is not for a session that has constant folding disabled.
        """
        form, (rows, columns) = self.weight.format, self.weight.codes.shape
        block = form.product_block(columns)
        assert block is not None
        if form.block is None:
            blocks = add_constant(graph, f"blocks_of_{columns}", [1, columns // block], ir.DataType.INT64)
            widening = ir.node("Expand", [self.scales, blocks])
        else:
            widening = ir.node("Cast", [self.scales], attributes={"to": ir.DataType.FLOAT})
        scales = widening.outputs[0]
        scales.name, scales.shape = f"{self.scales.name}.of_blocks", ir.Shape([rows, columns // block])
        scales.dtype, widening.name = ir.DataType.FLOAT, scales.name
        product = ir.node(
            "MatMulNBits",
            [x, self.codes, scales],
            attributes={
                "K": columns,
                "N": rows,
                "bits": form.bits,
                "block_size": block,
                "accuracy_level": accuracy_level,
            },
            domain=MICROSOFT,
        )
        graph.insert_before(before, [widening, product])
        return product


def add_blocks(graph: ir.Graph, name: str, source: RowSource, how: LinearQuantization) -> StoredBlocks:
    """Initializers of a weight [N, K] that MatMulNBits is to read.

    Raises:
        GraphError: It does not know the format, or the blocks do not divide the rows.
    """
    form = how.format
    if how.form not in BITS:
        raise GraphError(f"{name} cannot be {how.form} for onnxruntime.", CALIBRATE)
    if form is None or form.bits != BITS[how.form] or form.block not in (None, *BLOCK_SIZES):
        raise GraphError(
            f"{name} cannot be {how.form} with {described(form)} for onnxruntime.",
            f"Choose blocks of {', '.join(map(str, BLOCK_SIZES))} columns and {BITS[how.form]} bits.",
        )
    weight = quantized(source, how)
    if form.product_block(source.shape[1]) is None:
        raise GraphError(
            f"{name} has {source.shape[1]} columns, which no block of onnxruntime's divides.",
            f"They have {', '.join(map(str, BLOCK_SIZES))} columns: choose --precision fp16.",
        )
    codes = add_initializer(graph, f"{name}.codes", PackedBlocks(weight))
    return StoredBlocks(weight, codes, add_initializer(graph, f"{name}.scales", GroupScales(weight)))


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
