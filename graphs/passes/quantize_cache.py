"""For onnxruntime: keys and values are cached in 8 bits, a quarter of the bytes that every token reads.

    GroupQueryAttention(qkv, …, past_key fp32, past_value fp32, …)
        →  GroupQueryAttention(qkv, …, past_key int8, past_value int8, …, key_scale, value_scale)

The operator rounds new keys (rotated) and values to nearest even, saturates them at -128 and 127, writes the
codes, and computes in fp32 with what the codes stand for: code · scale. Later tokens and the new ones
themselves see nothing but codes, so a prompt says the same in one piece and in chunks.

A scale is one number per KV head. The operator knows one per tensor or one per channel: with one head they
are the same, and with several every channel of a head is given its head's number, [1, K, 1, h].

Illegal when:
  (1) keys or values of a layer are read by anything but one GroupQueryAttention, which then sees codes too;
  (2) the cache is not in fp32.

Source: onnxruntime `docs/ContribOperators.md`, com.microsoft.GroupQueryAttention.
"""

import math
from collections.abc import Sequence

import onnx_ir as ir
import torch

from gemma_export.errors import GraphError
from gemma_export.graphs.passes.patterns import users
from gemma_export.graphs.spec import num_layers
from gemma_export.graphs.tensors import InMemory, add_initializer
from gemma_export.runtime.manifest import CacheScales

BITS = 8
_KEY_SCALE, _VALUE_SCALE = 12, 13
"""Positions among the operator's inputs."""


def quantize_cache(model: ir.Model, scales: Sequence[CacheScales]) -> int:
    """Caches keys and values in int8; returns in how many layers.

    Args:
        model: Its attention is lowered to GroupQueryAttention, and what that replaced is removed.
        scales: Of every layer: what a code stands for, a positive number per KV head.

    Raises:
        GraphError: There are scales of another number of layers or heads, or one is not a positive number.
    """
    graph = model.graph
    layers = num_layers(model)
    if len(scales) != layers:
        raise _misfit(f"scales of {len(scales)} layers", f"{layers} layers")
    count = 0
    for layer, found in enumerate(scales):
        past_key, past_value = graph.inputs[2 + 2 * layer : 4 + 2 * layer]
        attention = _only_reader(past_key, past_value)
        if attention is None:
            continue
        key_scale = _add_scale(graph, f"layers.{layer}.self_attn.key_scale", found.key, past_key)
        value_scale = _add_scale(graph, f"layers.{layer}.self_attn.value_scale", found.value, past_value)
        attention.resize_inputs(_VALUE_SCALE + 1)
        attention.replace_input_with(_KEY_SCALE, key_scale)
        attention.replace_input_with(_VALUE_SCALE, value_scale)
        granularity = "PER_TENSOR" if len(found.key) == 1 else "PER_CHANNEL"
        for name in ("k_quant_type", "v_quant_type"):
            attention.attributes.add(ir.AttrString(name, granularity))
        attention.attributes.add(ir.AttrInt64("kv_cache_bit_width", BITS))
        for cache in (past_key, past_value, *attention.outputs[1:3]):
            cache.type = ir.TensorType(ir.DataType.INT8)
        count += 1
    return count


def _only_reader(past_key: ir.Value, past_value: ir.Value) -> ir.Node | None:
    """The GroupQueryAttention over a layer's fp32 cache, where nothing else reads that before or after."""
    readers = users(past_key) + users(past_value)
    attention = readers[0] if len(readers) == 2 and readers[0] is readers[1] else None
    if attention is None or attention.op_type != "GroupQueryAttention":
        return None
    if past_key.dtype != ir.DataType.FLOAT or any(output.uses() for output in attention.outputs[1:3]):
        return None
    return attention


def _add_scale(graph: ir.Graph, name: str, scales: Sequence[float], cache: ir.Value) -> ir.Value:
    """The scales as an initializer: fp32 [1] of one head, [1, K, 1, h] of several."""
    assert cache.shape is not None
    heads, head_dim = cache.shape[1], cache.shape[3]
    assert isinstance(heads, int)
    assert isinstance(head_dim, int)
    if len(scales) != heads:
        raise _misfit(f"{name} of {len(scales)} KV heads", f"{heads} of them")
    if not all(0 < scale < math.inf for scale in scales):
        raise GraphError(
            f"{name} is {list(scales)}, and a scale is a positive number.",
            "Calibrate again; if it stays so, look at the checkpoint.",
        )
    tensor = torch.tensor(scales, dtype=torch.float32)
    if heads > 1:
        tensor = tensor.reshape(1, heads, 1, 1).expand(1, heads, 1, head_dim).contiguous()
    return add_initializer(graph, name, InMemory(name, tensor))


def _misfit(found: str, wanted: str) -> GraphError:
    return GraphError(
        f"The calibration has {found}, and the graph has {wanted}.", "Calibrate for this checkpoint."
    )
