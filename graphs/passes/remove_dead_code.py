"""Nodes and initializers that no output needs are removed.

Whatever the other passes replaced is left behind for this one, so that none of them has to tidy up.
"""

import onnx_ir as ir
from onnx_ir.passes import common


def remove_dead_code(model: ir.Model) -> int:
    """Removes what is unused; returns how many nodes and initializers went."""
    graph = model.graph
    before = len(graph) + len(graph.initializers)
    common.RemoveUnusedNodesPass()(model)
    common.RemoveUnusedOpsetsPass()(model)
    return before - len(graph) - len(graph.initializers)
