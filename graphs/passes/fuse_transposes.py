"""For onnxruntime, run without its own fusions: a product reads what would be transposed for it.

    MatMul(x, Transpose(W))  →  FusedMatMul(x, W, transB=1)

where W [N, K] is any value, a weight that is converted in every step for one: its transposed copy would cost
more than the product.

Illegal when the transpose is not of two axes.
"""

import onnx_ir as ir

from gemma_export.graphs.passes.lower_linear import fuse


def fuse_transposes(model: ir.Model) -> int:
    """Fuses every transpose of a product's second operand; returns how many."""
    count = 0
    for node in list(model.graph):
        operand = node.inputs[1] if node.op_type == "MatMul" else None
        transpose = None if operand is None else operand.producer()
        if transpose is None or transpose.op_type != "Transpose":
            continue
        matrix, axes = transpose.inputs[0], transpose.attributes.get("perm")
        if matrix is None or axes is None or list(axes.as_ints()) != [1, 0]:
            continue
        fuse(model, node, matrix)
        count += 1
    return count
