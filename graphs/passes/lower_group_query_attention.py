"""For onnxruntime: a layer's split, rotations, cache writes and attention become one GroupQueryAttention.

    q, k, v = Split(Transpose(Reshape(qkv)))
    key     = TensorScatter(past_key, RotaryEmbedding(k), first)      present.key
    value   = TensorScatter(past_value, v, first)                     present.value
    Reshape(Transpose(Attention(RotaryEmbedding(q), key, value, mask)))
        →  GroupQueryAttention(qkv, , , past_key, past_value, last, total, cos, sin)

The fused operator reads only the slots that are valid (Attention with a mask reads all S), rotates on the
way, and writes new keys and values in place where past and present share a buffer. It counts instead of
masking: `last` = position_ids[:, -1] is the number of valid slots less one, `total` their largest count. A
window becomes its `local_window_size`, which counts the query's own token as the window does, and a soft-cap
its `softcap`.

Several tokens on top of a filled cache are accepted for one row at a time only, which is how the runtime
prefills.

Illegal when:
  (1) the mask is not a causal mask made of `position_ids`, or its window is not one number;
  (2) query, key and value do not come from one split of heads in that order, or are rotated by other tables;
  (3) the head size is not a multiple of 16, which the operator's rotation needs.

Source: onnxruntime `docs/ContribOperators.md`, com.microsoft.GroupQueryAttention.
"""

from dataclasses import dataclass

import onnx_ir as ir

from gemma_export.graphs.passes.patterns import ints, stand_in, users
from gemma_export.graphs.spec import MICROSOFT


@dataclass(frozen=True)
class _Layer:
    """The nodes and values of one layer's attention."""

    attention: ir.Node
    packed: ir.Value  # [B, T, (H + 2K)·h]
    rotary: ir.Node  # of the queries; the keys' reads the same tables
    write_key: ir.Node
    write_value: ir.Node
    window: int | None  # tokens that are seen
    heads: tuple[int, int]  # H, K
    output: ir.Value  # [B, T, H·h]


def _producer(value: ir.Value | None, op_type: str) -> ir.Node | None:
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == op_type else None


def _only_user(value: ir.Value, op_type: str) -> ir.Node | None:
    readers = users(value)
    return readers[0] if len(readers) == 1 and readers[0].op_type == op_type else None


@dataclass(frozen=True)
class CausalMask:
    """Where(slot <= position, 0, minimum); with a window, where also slot > position - window."""

    window: int | None


def find_causal_mask(mask: ir.Value | None) -> CausalMask | None:
    """The mask that a value is, where it is made of the graph's position_ids and of nothing more."""
    where = _producer(mask, "Where")
    visible = None if where is None else where.inputs[0]
    both = _producer(visible, "And")
    before = _producer(visible if both is None else both.inputs[0], "LessOrEqual")
    if before is None or not _are_slots(before.inputs[0]) or not _are_positions(before.inputs[1]):
        return None
    if both is None:
        return CausalMask(None)
    after = _producer(both.inputs[1], "Greater")
    beyond = None if after is None else _producer(after.inputs[1], "Sub")
    if after is None or beyond is None or after.inputs[0] is not before.inputs[0]:
        return None
    window = ints(beyond.inputs[1])
    if beyond.inputs[0] is not before.inputs[1] or window is None or len(window) != 1:
        return None
    return CausalMask(window[0])


def _are_slots(value: ir.Value | None) -> bool:
    return value is not None and value.is_initializer()


def _are_positions(value: ir.Value | None) -> bool:
    while value is not None and (unsqueeze := _producer(value, "Unsqueeze")) is not None:
        value = unsqueeze.inputs[0]
    return value is not None and value.name == "position_ids" and value.is_graph_input()


def _match(attention: ir.Node) -> _Layer | None:
    q, key, value, mask = attention.inputs[:4]
    rotary_q = _producer(q, "RotaryEmbedding")
    write_key, write_value = _producer(key, "TensorScatter"), _producer(value, "TensorScatter")
    causal = find_causal_mask(mask)
    if rotary_q is None or write_key is None or write_value is None or causal is None:
        return None
    rotary_k = _producer(write_key.inputs[1], "RotaryEmbedding")
    if rotary_k is None or rotary_k.inputs[1:] != rotary_q.inputs[1:]:
        return None
    split = _producer(rotary_q.inputs[0], "Split")
    parts = [rotary_q.inputs[0], rotary_k.inputs[0], write_value.inputs[1]]
    if split is None or parts != list(split.outputs):
        return None
    transpose = _producer(split.inputs[0], "Transpose")
    reshape = _producer(transpose.inputs[0], "Reshape") if transpose is not None else None
    sizes = ints(split.inputs[1])
    merge = _only_user(attention.outputs[0], "Transpose")
    flat = _only_user(merge.outputs[0], "Reshape") if merge is not None else None
    if reshape is None or sizes is None or flat is None or reshape.inputs[0] is None:
        return None
    shape = ints(reshape.inputs[1]) or [0]
    if shape[-1] % 16 != 0:
        return None
    return _Layer(
        attention,
        reshape.inputs[0],
        rotary_q,
        write_key,
        write_value,
        causal.window,
        (sizes[0], sizes[1]),
        flat.outputs[0],
    )


def _counts(graph: ir.Graph) -> tuple[ir.Value, ir.Value]:
    """`last` int32 [B] and `total` int32 scalar, computed once from position_ids."""
    positions = graph.inputs[1]
    minus_one = ir.node("Constant", [], attributes={"value": ir.tensor(-1)})
    one = ir.node("Constant", [], attributes={"value": ir.tensor(1, dtype=ir.DataType.INT32)})
    final = ir.node("Gather", [positions, minus_one.outputs[0]], attributes={"axis": 1})
    last = ir.node("Cast", [final.outputs[0]], attributes={"to": ir.DataType.INT32})
    longest = ir.node("ReduceMax", [last.outputs[0]], attributes={"keepdims": 0})
    total = ir.node("Add", [longest.outputs[0], one.outputs[0]])
    last.outputs[0].name, total.outputs[0].name = "last_position", "total_length"
    for node in (total, longest, last, final, one, minus_one):
        graph.insert_before(graph[0], node)
        wide = node in (final, minus_one)
        node.outputs[0].dtype = ir.DataType.INT64 if wide else ir.DataType.INT32
    return last.outputs[0], total.outputs[0]


def lower_group_query_attention(model: ir.Model) -> int:
    """Lowers the attention of every layer; returns how many layers."""
    graph = model.graph
    layers = [_match(node) for node in graph if node.op_type == "Attention"]
    found = [layer for layer in layers if layer is not None]
    if not found:
        return 0
    last, total = _counts(graph)
    for layer in found:
        past_key, past_value = layer.write_key.inputs[0], layer.write_value.inputs[0]
        attributes: dict[str, int | float] = {
            "num_heads": layer.heads[0],
            "kv_num_heads": layer.heads[1],
            "scale": layer.attention.attributes["scale"].as_float(),
            "do_rotary": 1,
        }
        if layer.window is not None:
            attributes["local_window_size"] = layer.window
        if (softcap := layer.attention.attributes.get("softcap")) is not None:
            attributes["softcap"] = softcap.as_float()
        fused = ir.node(
            "GroupQueryAttention",
            [layer.packed, None, None, past_key, past_value, last, total, *layer.rotary.inputs[1:3]],
            attributes=attributes,
            domain=MICROSOFT,
            num_outputs=3,
        )
        graph.insert_before(layer.attention, fused)
        replaced = (layer.output, layer.write_key.outputs[0], layer.write_value.outputs[0])
        for old, new in zip(replaced, fused.outputs, strict=True):
            stand_in(new, old)
            old.replace_all_uses_with(new, replace_graph_outputs=True)
            old.name = f"{new.name}.replaced"
        # What attention gives keeps its name, by which an audit knows it.
        attended = layer.attention.outputs[0]
        fused.outputs[0].name, attended.name = attended.name, f"{attended.name}.replaced"
    model.opset_imports[MICROSOFT] = 1
    return len(found)
