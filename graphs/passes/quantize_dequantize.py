"""For runtimes that take the precision of a product from the graph: weights as codes, in standard operators.

    w8           MatMul(x, Transpose(W))  →  MatMul(x, Transpose(DQ(codes, 2⁻¹⁴))) · (row scales · 2¹⁴)
    w8a8-tensor                              the same, with DQ(Q(x, s), s) for x
    w4                                       MatMul(x, Transpose(DQ(codes, block scales)))
    the table    Gather(E, ids)           →  Gather(DQ(codes, 2⁻¹⁴), ids) · Gather(row scales · 2¹⁴, ids)

with Q for QuantizeLinear and DQ for DequantizeLinear, which TensorRT folds into the product. With a scale per
row in DQ it does so too, but for one token it then expands the whole weight in memory, on every call; with
one number for all codes it does not. The table is one initializer and one DQ, which lookup and head read.

That number is the smallest normal one of fp16: each code times it is exact there, and the product does not
leave fp16 whatever the weights. With |x| below 512 on average over 16384 columns, the sum of |x| · 127 · 2⁻¹⁴
is below 65504. The row's own scale comes after it, in fp32 where the range audit has named the layer.

The scale of an activation is rounded up to 8 binary digits: fp16 and bfloat16 hold it, so Q and DQ have the
same one whatever their formats.

A layer of the form `float` is left as it is.

Illegal, and an error, when:
  (1) nothing says how a layer or the table is quantized, or something is said of one that is not there;
  (2) the form is none of these, or the weight's format not the form's: a scale per row with 8 bits, per block
      with 4;
  (3) scales may be negative, which TensorRT does not take;
  (4) the table is to have 4 bits: a lookup reads it, and the head is where they cost the most;
  (5) the scale of an activation is missing, or no positive number.
"""

import math
from collections.abc import Mapping

import onnx_ir as ir
import torch

from gemma_export.errors import GraphError
from gemma_export.graphs.passes.merge_projections import find_linear
from gemma_export.graphs.passes.patterns import stand_in, users
from gemma_export.graphs.passes.quantized_layers import (
    CALIBRATE,
    add_constant,
    chosen,
    described,
    layer_name,
    lookup_tables,
)
from gemma_export.graphs.quantization import LinearQuantization, Quantization
from gemma_export.graphs.quantized import PackedRows, QuantizedWeight, RowScales, quantized
from gemma_export.graphs.tensors import ScaleRows, add_initializer, streamed

CODE_STEP = 2.0**-14
"""What a code of 8 bits stands for before its row's factor."""
SCALE_DIGITS = 8
"""Binary digits of an activation's scale: those of bfloat16."""
BITS = {"w8": 8, "w8a8-tensor": 8, "w4": 4}
"""Of the weights, by form."""


def quantize_dequantize(model: ir.Model, quantization: Quantization) -> int:
    """Quantizes every linear layer and the table; returns how many weights are codes now.

    Args:
        model: The canonical graph, in fp32.
        quantization: A form of `float`, `w8`, `w8a8-tensor` or `w4` for each of them, by name.

    Raises:
        GraphError: A layer cannot be quantized as said, for one of the reasons above.
    """
    graph, linears = model.graph, quantization.linears
    tables = lookup_tables(graph)
    weights = dict.fromkeys(tables)
    weights |= dict.fromkeys(linear.weight for node in graph if (linear := find_linear(node)) is not None)
    if unknown := sorted(linears.keys() - {layer_name(weight) for weight in weights}):
        raise GraphError(f"The graph has no linear layer {unknown[0]} to be quantized.", CALIBRATE)
    how = {weight: _checked(linears, weight, looked_up=weight in tables) for weight in weights}
    codes = {weight: form for weight, form in how.items() if form.form != "float"}
    for weight, form in codes.items():
        _quantize(graph, weight, form)
    return len(codes)


def rounded_scale(scale: float) -> float:
    """The scale of an activation as graphs have it: rounded up to 8 binary digits."""
    fraction, exponent = math.frexp(scale)
    return math.ldexp(math.ceil(math.ldexp(fraction, SCALE_DIGITS)), exponent - SCALE_DIGITS)


def _checked(
    linears: Mapping[str, LinearQuantization], weight: ir.Value, *, looked_up: bool
) -> LinearQuantization:
    """How a weight is quantized, unless standard operators or the runtimes that read them cannot do it."""
    name = layer_name(weight)
    how = chosen(linears, name)
    if how.form == "float":
        return how
    form, scale = how.format, how.activation_scale
    problem = None
    if how.form not in BITS:
        problem = "no standard operator computes that"
    elif form is None or form.bits != BITS[how.form] or (form.block is None) != (form.bits == 8):
        problem = f"{described(form)} is not the format of its weights"
    elif form.negative_scales:
        problem = "its scales may be negative"
    elif looked_up and form.bits == 4:
        problem = "the embedding table has 8 bits"
    elif how.form == "w8a8-tensor" and (scale is None or not 0 < scale < math.inf):
        problem = f"the scale of its activation is {scale}"
    if problem is not None:
        raise GraphError(f"{name} cannot be {how.form} in standard operators: {problem}.", CALIBRATE)
    return how


def _quantize(graph: ir.Graph, value: ir.Value, how: LinearQuantization) -> None:
    """Puts codes in the place of a weight, and what else its form needs around what reads it."""
    tensor, name = streamed(value), layer_name(value)
    assert tensor is not None
    weight = quantized(tensor.source, how)
    lookups = [node for node in users(value) if node.op_type == "Gather"]
    products = [reader for node in users(value) for reader in users(node.outputs[0]) if find_linear(reader)]
    dequantize = _dequantize(graph, name, weight)
    readers = users(value)
    graph.insert_before(next(node for node in graph if node in readers), dequantize)
    value.replace_all_uses_with(dequantize.outputs[0])
    if how.form == "w4":
        return
    # Divided by what the codes are multiplied with already; both are powers of two.
    factors = torch.tensor(1 / CODE_STEP).expand(tensor.source.shape[0])
    scales = add_initializer(graph, f"{name}.scales", ScaleRows(RowScales(weight), factors))
    for lookup in lookups:
        _multiply(graph, lookup, _scales_of_rows(graph, lookup, scales))
    for product in products:
        if how.form == "w8a8-tensor" and how.activation_scale is not None:
            _round_operand(graph, name, product, rounded_scale(how.activation_scale))
        _multiply(graph, product, scales)


def _dequantize(graph: ir.Graph, name: str, weight: QuantizedWeight) -> ir.Node:
    """A node [N, K] that makes numbers of new initializers: of 8-bit codes all but their row's scale."""
    inputs, attributes = [], {}
    if weight.format.block is None:
        inputs.append(add_initializer(graph, f"{name}.codes", weight.codes))
        inputs.append(add_constant(graph, "code_step", CODE_STEP))
    else:
        inputs.append(add_initializer(graph, f"{name}.codes", PackedRows(weight), ir.DataType.INT4))
        inputs.append(add_initializer(graph, f"{name}.scales", weight.scales))
        attributes = {"axis": 1, "block_size": weight.format.block}
    node = ir.node("DequantizeLinear", inputs, attributes=attributes, name=f"{name}.numbers")
    _describe(node.outputs[0], node.name, weight.codes.shape)
    return node


def _scales_of_rows(graph: ir.Graph, lookup: ir.Node, scales: ir.Value) -> ir.Value:
    """The scale of each row that is looked up: [B, T, 1]."""
    name, ids = lookup.outputs[0].name, lookup.inputs[1]
    assert ids is not None
    assert ids.shape is not None
    gather = ir.node("Gather", [scales, ids], name=f"{name}.scales_of_ids")
    last_axis = add_constant(graph, "last_axis", [-1], ir.DataType.INT64)
    unsqueeze = ir.node("Unsqueeze", [gather.outputs[0], last_axis], name=f"{name}.scales_of_rows")
    _describe(gather.outputs[0], gather.name, ids.shape)
    _describe(unsqueeze.outputs[0], unsqueeze.name, [*ids.shape, 1])
    graph.insert_before(lookup, [gather, unsqueeze])
    return unsqueeze.outputs[0]


def _round_operand(graph: ir.Graph, name: str, product: ir.Node, scale: float) -> None:
    """Rounds a product's x to 8 bits with one scale."""
    x = product.inputs[0]
    assert x is not None
    assert x.shape is not None
    step = add_constant(graph, f"{name}.input_scale", scale)
    zero_point = add_constant(graph, "zero_point", 0, ir.DataType.INT8)
    quantize = ir.node("QuantizeLinear", [x, step, zero_point], name=f"{name}.input_codes")
    numbers = ir.node("DequantizeLinear", [quantize.outputs[0], step, zero_point], name=f"{name}.input")
    _describe(quantize.outputs[0], quantize.name, x.shape, ir.DataType.INT8)
    _describe(numbers.outputs[0], numbers.name, x.shape)
    graph.insert_before(product, [quantize, numbers])
    product.replace_input_with(0, numbers.outputs[0])


def _multiply(graph: ir.Graph, node: ir.Node, factors: ir.Value) -> None:
    """Multiplies a node's output with factors; the result takes its name and its readers."""
    unscaled = node.outputs[0]
    multiply = ir.node("Mul", [unscaled, factors])
    result = multiply.outputs[0]
    stand_in(result, unscaled)
    unscaled.replace_all_uses_with(result, replace_graph_outputs=True)
    multiply.replace_input_with(0, unscaled)
    multiply.name = result.name
    unscaled.name = node.name = f"{result.name}.unscaled"
    graph.insert_after(node, multiply)


def _describe(
    value: ir.Value,
    name: str | None,
    shape: ir.Shape | list[int | ir.SymbolicDim] | tuple[int, ...],
    dtype: ir.DataType = ir.DataType.FLOAT,
) -> None:
    value.name, value.shape, value.dtype = name, ir.Shape(shape), dtype
