"""For a graph that a CPU runs in fp32: codes are multiplied as they are, and what they stand for comes first.

    MatMul(x, Transpose(f(DQ(codes, step))))  →  MatMul(x · step, Transpose(Cast(codes)))

where the codes of 8 bits are stored, step is one power of two for all of them, and f casts the numbers to
16 bits and back, as a device has them. A power of two changes no digit: products and sums are the same number
by number, and of the weight one pass over memory is left where there were three.

Illegal, and left alone, when step is so small or so large that 16 bits do not hold every code times it.
"""

import math

import onnx_ir as ir

from gemma_export.graphs.passes.patterns import scalar, stand_in

EXACT = (2.0**-24, 2.0**8)
"""Between these every code of 8 bits times a power of two is a number of fp16, and of bfloat16."""


def multiply_codes(model: ir.Model) -> int:
    """Rewrites products with stored codes; returns how many.

    Args:
        model: A graph in fp32, as `emulate_half` makes it.
    """
    graph = model.graph
    products = [(node, found) for node in graph if (found := _codes_and_step(node)) is not None]
    for product, (codes, step) in products:
        x, transpose = product.inputs
        assert x is not None
        assert transpose is not None
        scaled = ir.node("Mul", [x, step], name=f"{product.name}.scaled_input")
        stand_in(scaled.outputs[0], x)
        scaled.outputs[0].name = scaled.name
        numbers = ir.node("Cast", [codes], attributes={"to": ir.DataType.FLOAT})
        output = numbers.outputs[0]
        output.name, output.shape, output.dtype = f"{product.name}.codes", codes.shape, ir.DataType.FLOAT
        turned = ir.node("Transpose", [output], attributes={"perm": [1, 0]})
        stand_in(turned.outputs[0], transpose)
        turned.outputs[0].name = f"{product.name}.turned_codes"
        graph.insert_before(product, [scaled, numbers, turned])
        product.replace_input_with(0, scaled.outputs[0])
        product.replace_input_with(1, turned.outputs[0])
    return len(products)


def _codes_and_step(node: ir.Node) -> tuple[ir.Value, ir.Value] | None:
    """The stored codes [N, K] that a product multiplies with, and the step [] in fp32; None of any other."""
    transpose = None if node.op_type != "MatMul" or node.inputs[1] is None else node.inputs[1].producer()
    if transpose is None or transpose.op_type != "Transpose":
        return None
    maker = None if transpose.inputs[0] is None else transpose.inputs[0].producer()
    while maker is not None and maker.op_type == "Cast" and maker.inputs[0] is not None:
        maker = maker.inputs[0].producer()
    if maker is None or maker.op_type != "DequantizeLinear":
        return None
    codes, step = maker.inputs[0], maker.inputs[1]
    if codes is None or step is None or not codes.is_initializer() or codes.dtype != ir.DataType.INT8:
        return None
    cast = step.producer()
    size = scalar(step if cast is None else cast.inputs[0])
    if size is None or not EXACT[0] <= size <= EXACT[1] or math.frexp(size)[0] != 0.5:
        return None
    return (codes, step) if step.dtype == ir.DataType.FLOAT else None
