"""For onnxruntime's CUDA provider: GroupQueryAttention is told the cache's slots as its longest row.

    GroupQueryAttention(…, last, total = longest of position_ids + 1, …)
        →  GroupQueryAttention(…, last, total = S, …)

The operator wants that number on the host, before it starts: made of position_ids, every step would wait for
the device to bring it there (and onnxruntime 1.31 would then take it for zero). It only sizes buffers and
divides the work; what a row sees is told by `last`, which stays on the device.

A step of several tokens then always counts as one on top of a filled cache, and those are accepted for one
row at a time: this is how the runtime prefills.
"""

import onnx_ir as ir

from gemma_export.graphs.passes.quantized_layers import add_constant


def fix_total_length(model: ir.Model) -> int:
    """Rewrites every GroupQueryAttention over a cache of known size; returns how many."""
    graph = model.graph
    count = 0
    for node in graph:
        past = node.inputs[3] if node.op_type == "GroupQueryAttention" else None
        if past is None or past.shape is None or not isinstance(slots := past.shape[2], int):
            continue
        total = add_constant(graph, "cache_slots", slots, ir.DataType.INT32)
        node.replace_input_with(6, total)
        count += 1
    return count
