"""For onnxruntime: a product with a stored weight reads it as it is stored.

    MatMul(x, Transpose(W))  →  FusedMatMul(x, W, transB=1)

W [N, K] is the layout of the checkpoint. Left as a Transpose, the runtime would fold it into a second copy of
the weight at load; transposed while it is written, every weight would cost a pass of its own.

Illegal when W is not stored, or the transpose is not of two axes.

Source: onnxruntime `docs/ContribOperators.md`, com.microsoft.FusedMatMul.
"""

import onnx_ir as ir

from gemma_export.graphs.passes.merge_projections import find_linear
from gemma_export.graphs.passes.patterns import stand_in
from gemma_export.graphs.spec import MICROSOFT


def lower_linear(model: ir.Model) -> int:
    """Lowers every linear layer and the head; returns how many (4 · layers + 1 when merged)."""
    graph = model.graph
    linears = [linear for node in graph if (linear := find_linear(node)) is not None]
    for linear in linears:
        fuse(model, linear.product, linear.weight)
    return len(linears)


def fuse(model: ir.Model, product: ir.Node, weight: ir.Value) -> None:
    """Puts a product with W [N, K] in the place of one with W transposed."""
    graph = model.graph
    fused = ir.node("FusedMatMul", [product.inputs[0], weight], attributes={"transB": 1}, domain=MICROSOFT)
    graph.insert_before(product, fused)
    new, old = fused.outputs[0], product.outputs[0]
    stand_in(new, old)
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    old.name = f"{new.name}.replaced"
    model.opset_imports[MICROSOFT] = 1
