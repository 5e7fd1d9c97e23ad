"""For a target without 16-bit arithmetic: weights are stored in 16 bits and computed with in fp32.

    op(x, W)        →  op(x, Cast(W₁₆, fp32))
    Gather(E, ids)  →  Cast(Gather(E₁₆, ids), fp32)     only the rows that are looked up are converted

Norm gains and rotary tables stay in fp32: they are a thousandth of the bytes, and `1 + w` needs the digits.
So do the scales of weights that are stored as codes.

Illegal when a weight has values that the 16-bit format cannot hold: those named in `keep` stay in fp32.
"""

from collections.abc import Collection

import onnx_ir as ir
import torch

from gemma_export.graphs.tensors import IR_DTYPES, StreamedTensor, in_format, streamed


def store_half(model: ir.Model, dtype: torch.dtype, keep: Collection[str] = ()) -> int:
    """Stores every matrix of weights in `dtype`; returns how many.

    Args:
        model: Computes in fp32.
        dtype: float16 or bfloat16.
        keep: Names of initializers that stay in fp32.
    """
    graph = model.graph
    count = 0
    for value in list(graph.initializers.values()):
        tensor = streamed(value)
        if tensor is None or not is_weight_matrix(value) or value.name in keep:
            continue
        users = [use.node for use in value.uses()]
        value.const_value = StreamedTensor(in_format(tensor.source, dtype), name=value.name)
        value.dtype = IR_DTYPES[dtype]
        lookups = [node for node in users if node.op_type == "Gather"]
        for lookup in lookups:
            _cast_after(graph, lookup, dtype)
        others = [node for node in users if node.op_type != "Gather"]
        if others:
            _cast_before(graph, value, others)
        count += 1
    return count


def is_weight_matrix(value: ir.Value) -> bool:
    """Whether an initializer is a matrix of the checkpoint: no gain, rotary table, codes or scales."""
    return value.shape is not None and len(value.shape) == 2 and str(value.name).endswith(".weight")


def _cast_after(graph: ir.Graph, node: ir.Node, dtype: torch.dtype) -> None:
    output = node.outputs[0]
    cast = ir.node("Cast", [output], attributes={"to": ir.DataType.FLOAT})
    cast.outputs[0].shape, cast.outputs[0].dtype = output.shape, ir.DataType.FLOAT
    cast.outputs[0].name = f"{output.name}.fp32"
    output.replace_all_uses_with(cast.outputs[0])
    cast.replace_input_with(0, output)
    output.dtype = IR_DTYPES[dtype]
    graph.insert_after(node, cast)


def _cast_before(graph: ir.Graph, value: ir.Value, users: list[ir.Node]) -> None:
    cast = ir.node("Cast", [value], attributes={"to": ir.DataType.FLOAT})
    cast.outputs[0].shape, cast.outputs[0].dtype = value.shape, ir.DataType.FLOAT
    cast.outputs[0].name = f"{value.name}.fp32"
    for user in users:
        for index, operand in enumerate(user.inputs):
            if operand is value:
                user.replace_input_with(index, cast.outputs[0])
    graph.insert_before(users[0], cast)
