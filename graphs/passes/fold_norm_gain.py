"""`1 + w` of every RMSNorm becomes an initializer.

    Add(w, 1.0)  →  gain = 1 + w, added in fp32 while the weight is written

Illegal when:
  (1) the addend is not exactly the scalar 1;
  (2) w is not an initializer, or already has a transformation that loses digits (a cast to 16 bits).
"""

import onnx_ir as ir

from gemma_export.graphs.passes.patterns import scalar
from gemma_export.graphs.tensors import OnePlus, add_initializer, streamed


def fold_norm_gain(model: ir.Model) -> int:
    """Folds every `1 + w`; returns how many."""
    graph = model.graph
    count = 0
    for node in [node for node in graph if node.op_type == "Add"]:
        weight, addend = node.inputs
        if streamed(weight) is None:
            weight, addend = addend, weight
        tensor = streamed(weight)
        if tensor is None or tensor.dtype != ir.DataType.FLOAT or scalar(addend) != 1.0:
            continue
        assert weight is not None
        gain = add_initializer(
            graph, f"{str(weight.name).removesuffix('.weight')}.gain", OnePlus(tensor.source)
        )
        node.outputs[0].replace_all_uses_with(gain)
        graph.remove(node, safe=True)
        count += 1
    return count
