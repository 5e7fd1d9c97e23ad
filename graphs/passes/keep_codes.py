"""For TensorRT on SM 75: what a product of codes multiplies with is made by arithmetic.

    MatMul(Reshape(x), Transpose(DQ(codes)))  →  MatMul(Max(r, r), Transpose(DQ(codes)))   with r = Reshape(x)

The kernels of SM 75 read 8-bit codes only where the other operand is computed. Behind a reshape, as heads of
attention have one before `o_proj`, the whole weight is made 16-bit numbers in memory first, in every step.
The greater of a number and itself is that number, and arithmetic to TensorRT, which knows no better. A factor
of 1 and a cast there and back it removes; another factor it moves behind the product.

On any other device it is a kernel for nothing, in every layer of a decoding step: it has to be asked for.

Illegal, and left alone, when:
  (1) the weight is stored as numbers, or has 4 bits, which SM 75 does not run;
  (2) x is rounded to codes too, or anything else is computed between the reshape and the product.
"""

import onnx_ir as ir

from gemma_export.graphs.passes.patterns import stand_in
from gemma_export.graphs.tensors import streamed


def keep_codes(model: ir.Model) -> int:
    """Puts arithmetic before products of codes; returns before how many.

    Args:
        model: The graph in its final formats.
    """
    products = [node for node in model.graph if _multiplies_codes(node) and _is_reshaped(node.inputs[0])]
    for product in products:
        x = product.inputs[0]
        assert x is not None
        greater = ir.node("Max", [x, x], name=f"{product.name}.computed_input")
        output = greater.outputs[0]
        stand_in(output, x)
        output.name = greater.name
        model.graph.insert_before(product, greater)
        product.replace_input_with(0, output)
    return len(products)


def _multiplies_codes(node: ir.Node) -> bool:
    """Whether a node is a product with a stored weight of 8-bit codes, behind one transpose."""
    value = node.inputs[1] if node.op_type == "MatMul" else None
    for operator in ("Transpose", "DequantizeLinear"):
        maker = None if value is None else value.producer()
        if maker is None or maker.op_type != operator:
            return False
        value = maker.inputs[0]
    return value is not None and value.dtype == ir.DataType.INT8 and streamed(value) is not None


def _is_reshaped(value: ir.Value | None) -> bool:
    maker = None if value is None else value.producer()
    return maker is not None and maker.op_type == "Reshape"
