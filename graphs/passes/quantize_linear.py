"""For onnxruntime: a product with a stored weight becomes one over codes of 8 or 4 bits.

    w8, w4       MatMul(x, Transpose(W))  →  MatMulNBits(x, packed codes [N, G, b · bits / 8],
                                                         Cast(scales [N, G], fp32))
                                             with a scale per row, Expand(scales [N, 1]) to [N, G]

    w8a8-token   MatMul(x, Transpose(W))  →  step  = max(ReduceMax(|x|) / 127, 2⁻¹⁰⁰)     one per token
                                             codes = QuantizeLinear(x / step, 1, 128)     uint8
                                             Cast(MatMulInteger(codes, Wᵀ [K, N], 128)) · step · row scales

A layer of the form `float` is left for `lower_linear`; the embedding table, which the head reads too, for
`quantize_embedding`.

MatMulInteger has no transposed operand: its codes are written [K, N]. This is the spelling of the products
and roundings that onnxruntime computes fastest, and what `quantization.round_per_token` does in fp32.
A CPU's MatMulNBits rounds x to 8 bits as well, per block of columns: that is what its accuracy level 4 means,
and at any other it is tens of times slower; a GPU's takes x as it is. The scales of blocks are stored in
bfloat16, whose digits are all that they have. MatMulNBits knows no scale of a whole row: it is repeated for
each block, when the graph is loaded.

Illegal, and an error, when:
  (1) nothing says how a layer is quantized, or something is said of a layer that the graph does not have;
  (2) the form is none of these: onnxruntime computes no other fast;
  (3) the weight's format is not the form's: 8 bits with a scale per row for w8a8-token; 8 bits for w8 and 4
      for w4, with a scale per row or blocks of 16, 32, 64, 128 or 256 columns, which is what MatMulNBits
      knows;
  (4) the blocks do not divide the rows; with a scale per row, none of those does.

Source: onnxruntime `docs/ContribOperators.md`, com.microsoft.MatMulNBits.
"""

from collections.abc import Mapping

import onnx_ir as ir

from gemma_export.errors import GraphError
from gemma_export.graphs.passes.merge_projections import Linear, find_linear
from gemma_export.graphs.passes.quantized_layers import (
    CALIBRATE,
    ROUNDS_X,
    add_blocks,
    add_constant,
    chosen,
    described,
    layer_name,
    lookup_tables,
    take_place,
)
from gemma_export.graphs.quantization import SMALLEST_SCALE, LinearQuantization
from gemma_export.graphs.quantized import RowScales, TransposedCodes, quantized
from gemma_export.graphs.spec import MICROSOFT
from gemma_export.graphs.tensors import add_initializer


def quantize_linear(
    model: ir.Model, linears: Mapping[str, LinearQuantization], accuracy_level: int = ROUNDS_X
) -> int:
    """Quantizes every linear layer but those of the form `float`; returns how many.

    Args:
        model: Canonical but for the attention, which may be lowered; in fp32.
        linears: How, by the name of the layer or of the table: all of them.
        accuracy_level: Of MatMulNBits.

    Raises:
        GraphError: A layer cannot be quantized as said, for one of the reasons above.
    """
    graph = model.graph
    tables = lookup_tables(graph)
    found = [linear for node in graph if (linear := find_linear(node)) is not None]
    layers = {layer_name(linear.weight): linear for linear in found if linear.weight not in tables}
    known = {*layers, *map(layer_name, tables)}
    if unknown := sorted(linears.keys() - known):
        raise GraphError(f"The graph has no linear layer {unknown[0]} to be quantized.", CALIBRATE)
    count = 0
    for name, linear in layers.items():
        how = chosen(linears, name)
        if how.form == "float":
            continue
        if how.form == "w8a8-token":
            product = _product_of_rounded_tokens(graph, name, linear, how)
        else:
            product = _product_of_blocks(graph, name, linear, how, accuracy_level)
        take_place(graph, linear.product, product)
        count += 1
    if count:
        model.opset_imports[MICROSOFT] = 1
    return count


def _product_of_blocks(
    graph: ir.Graph, name: str, linear: Linear, how: LinearQuantization, accuracy_level: int
) -> ir.Node:
    x = linear.product.inputs[0]
    assert x is not None
    stored = add_blocks(graph, name, linear.tensor.source, how)
    return stored.insert_product(graph, linear.product, x, accuracy_level)


def _product_of_rounded_tokens(
    graph: ir.Graph, name: str, linear: Linear, how: LinearQuantization
) -> ir.Node:
    form = how.format
    if form is None or form.bits != 8 or form.block is not None:
        raise GraphError(
            f"{name} cannot be {how.form} with {described(form)} for onnxruntime.",
            "Its weights have 8 bits and a scale per row.",
        )
    x = linear.product.inputs[0]
    assert x is not None
    weight = quantized(linear.tensor.source, how)
    codes = add_initializer(graph, f"{name}.codes", TransposedCodes(weight))
    scales = add_initializer(graph, f"{name}.scales", RowScales(weight))
    last_axis = add_constant(graph, "last_axis", [-1], ir.DataType.INT64)
    largest_code = add_constant(graph, "largest_code", 127.0)
    smallest_step = add_constant(graph, "smallest_step", SMALLEST_SCALE)
    one = add_constant(graph, "step_of_one", 1.0)
    zero_point = add_constant(graph, "zero_point", 128, ir.DataType.UINT8)

    wide, narrow, result = x.shape, _with_last(x.shape, 1), linear.output.shape

    def insert(
        op_type: str,
        *inputs: ir.Value,
        called: str,
        shape: ir.Shape | None,
        dtype: ir.DataType = ir.DataType.FLOAT,
        **attributes: int,
    ) -> ir.Value:
        node = ir.node(op_type, inputs, attributes=attributes, name=f"{name}.{called}")
        graph.insert_before(linear.product, node)
        output = node.outputs[0]
        output.name, output.shape, output.dtype = node.name, shape, dtype
        return output

    uint8, int32 = ir.DataType.UINT8, ir.DataType.INT32
    magnitudes = insert("Abs", x, called="magnitudes", shape=wide)
    largest = insert("ReduceMax", magnitudes, last_axis, called="largest", shape=narrow, keepdims=1)
    # A token of zeros has a step too: 0 / 0 is no code.
    steps = insert("Div", largest, largest_code, called="unguarded_steps", shape=narrow)
    steps = insert("Max", steps, smallest_step, called="steps", shape=narrow)
    quotients = insert("Div", x, steps, called="quotients", shape=wide)
    tokens = insert(
        "QuantizeLinear", quotients, one, zero_point, called="input_codes", shape=wide, dtype=uint8
    )
    sums = insert("MatMulInteger", tokens, codes, zero_point, called="sums", shape=result, dtype=int32)
    numbers = insert("Cast", sums, called="numbers", shape=result, to=ir.DataType.FLOAT)
    by_token = insert("Mul", numbers, steps, called="by_token", shape=result)
    by_row = ir.node("Mul", [by_token, scales])
    graph.insert_before(linear.product, by_row)
    return by_row


def _with_last(shape: ir.Shape | None, size: int) -> ir.Shape | None:
    """A shape with another last axis."""
    return None if shape is None else ir.Shape([*shape[:-1], size])
