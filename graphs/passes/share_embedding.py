"""The head reads the table that the lookup reads.

    Gather(E, ids), MatMul(x, Transpose(E'))  →  MatMul(x, Transpose(E)), where E' reads the same rows as E

Gemma's input and output embeddings are one tensor, a fifth of the 2B model; a second initializer is a second
copy on the disk and in memory.

Illegal when E and E' do not read the same source in the same format: an untied head keeps its own table.
"""

import onnx_ir as ir

from gemma_export.graphs.tensors import streamed


def share_embedding(model: ir.Model) -> int:
    """Points every head at the lookup's table; returns how many tables the lookup and a head now share."""
    graph = model.graph
    shared = 0
    lookups = [node for node in graph if node.op_type == "Gather" and streamed(node.inputs[0]) is not None]
    for lookup in lookups:
        table = lookup.inputs[0]
        tensor = streamed(table)
        assert tensor is not None
        for other in list(graph.initializers.values()):
            twin = streamed(other)
            if other is table or twin is None or twin.source != tensor.source:
                continue
            assert table is not None
            other.replace_all_uses_with(table)
        assert table is not None
        shared += any(use.node.op_type == "Transpose" for use in table.uses())
    return shared
