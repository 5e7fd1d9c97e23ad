"""Grouped scores, mask, softmax and weighted sum become one Attention with an explicit mask.

    grouped = Reshape(q) [B, K, G, T, h]
    Reshape(Softmax(grouped · keyᵀ · scale + mask) · value)  →  Attention(q, key, value, mask, scale)
    Reshape(Softmax(Tanh(grouped · keyᵀ · scale / cap) · cap + mask) · value)  →  the same with softcap = cap

with q [B, H, T, h], key and value [B, K, S, h], mask [B, 1, T, S]. The operator repeats each KV head for
G = H / K query heads that follow each other, which is what the reshape does.

The mask stays an input, and neither `is_causal` nor a count of valid slots is used: TensorRT reads
`is_causal` from the upper left corner and ignores the count, so every decoded token would be wrong there.

The soft-cap comes before the mask. The operator was first defined the other way round, and older runtimes
compute it so: what is masked then weighs e^-cap instead of nothing (onnx/onnx#7865).

Illegal when:
  (1) softmax is not over the slots, or the scale or the cap is not one number;
  (2) the reshape does not split heads into [K, G] in that order;
  (3) key or value are transposed, or the mask is not broadcast over both head axes.
"""

from typing import Any

import onnx_ir as ir
from onnxscript.rewriter import pattern

from gemma_export.graphs.passes.patterns import apply, ints, last_dim, scalar


def _scores(op: Any, q: Any, key: Any, scale: Any, axis: Any, split: Any) -> Any:
    grouped = op.Reshape(q, split, _allow_other_attributes=True)
    return op.Mul(op.MatMul(grouped, op.Transpose(op.Unsqueeze(key, axis), perm=[0, 1, 2, 4, 3])), scale)


def _attended(op: Any, scores: Any, value: Any, mask: Any, axis: Any, merge: Any) -> Any:
    weights = op.Softmax(op.Add(scores, op.Unsqueeze(mask, axis)), axis=-1)
    attended = op.MatMul(weights, op.Unsqueeze(value, axis))
    return op.Reshape(attended, merge, _allow_other_attributes=True)


def _attention(
    op: Any, q: Any, key: Any, value: Any, mask: Any, scale: Any, axis: Any, split: Any, merge: Any
) -> Any:
    return _attended(op, _scores(op, q, key, scale, axis, split), value, mask, axis, merge)


def _capped_attention(
    op: Any, q: Any, key: Any, value: Any, mask: Any, scale: Any, cap: Any, axis: Any, split: Any, merge: Any
) -> Any:
    scores = op.Mul(op.Tanh(op.Div(_scores(op, q, key, scale, axis, split), cap)), cap)
    return _attended(op, scores, value, mask, axis, merge)


def _check(
    context: Any,
    q: ir.Value,
    key: ir.Value,
    value: ir.Value,
    mask: ir.Value,
    scale: ir.Value,
    axis: ir.Value,
    split: ir.Value,
    cap: ir.Value | None = None,
    **_: Any,
) -> pattern.MatchResult:
    result = pattern.MatchResult()
    if ints(axis) != [2]:
        return result.fail("key, value and mask are not broadcast over the groups", axis)
    if scalar(scale) is None:
        return result.fail("the scale is not one number", scale)
    if cap is not None and not (scalar(cap) or 0.0) > 0.0:
        return result.fail("the soft-cap is not one positive number", cap)
    producer = split.producer()
    parts = producer.inputs if producer is not None and producer.op_type == "Concat" else ()
    if len(parts) != 5 or q.shape is None or len(q.shape) != 4 or key.shape is None:
        return result.fail("the queries are not split into [B, K, G, T, h]", split)
    if ints(parts[1]) != [key.shape[1]] or last_dim(q) != last_dim(key):
        return result.fail("the heads are not split by KV head first", split)
    return result


def _replace(
    op: Any,
    q: ir.Value,
    key: ir.Value,
    value: ir.Value,
    mask: ir.Value,
    scale: ir.Value,
    cap: ir.Value | None = None,
    **_: Any,
) -> Any:
    attributes = {"scale": scalar(scale)} | ({} if cap is None else {"softcap": scalar(cap)})
    return op.Attention(q, key, value, mask, **attributes)


RULES = [
    pattern.RewriteRule(_attention, _replace, _check, name="Attention", remove_nodes=False),
    pattern.RewriteRule(_capped_attention, _replace, _check, name="capped Attention", remove_nodes=False),
]


def fuse_attention(model: ir.Model) -> int:
    """Fuses every attention; returns how many (one a layer)."""
    return apply(model, RULES)
