"""The plain operators of a rotation become one RotaryEmbedding that reads the tables by position.

    low, high = Split(x, 2, axis=-1)
    Concat(low·c - high·s, high·c + low·s)  →  RotaryEmbedding(x, cos, sin, position_ids)
    with c = Unsqueeze(GatherND(cos, Unsqueeze(position_ids, -1)), 1), and s likewise from sin

The operator's default (not interleaved) pairs i with i + h/2, as Gemma does.

Illegal when:
  (1) the halves are not two, not equal, or not of the last axis (an interleaved rotation);
  (2) cos and sin are read at different positions, or are not stored tables of h/2 columns;
  (3) c and s are not broadcast over the heads axis of a 4-D x.
"""

from typing import Any

import onnx_ir as ir
from onnxscript.rewriter import pattern

from gemma_export.graphs.passes.patterns import apply, ints, last_dim


def _rotation(op: Any, x: Any, cos: Any, sin: Any, positions: Any, last: Any, heads_axis: Any) -> Any:
    index = op.Unsqueeze(positions, last)
    c = op.Unsqueeze(op.GatherND(cos, index, _allow_other_attributes=True), heads_axis)
    s = op.Unsqueeze(op.GatherND(sin, index, _allow_other_attributes=True), heads_axis)
    low, high = op.Split(x, axis=3, num_outputs=2, _outputs=2)
    return op.Concat(
        op.Sub(op.Mul(low, c), op.Mul(high, s)), op.Add(op.Mul(high, c), op.Mul(low, s)), axis=-1
    )


def _check(
    context: Any,
    x: ir.Value,
    cos: ir.Value,
    sin: ir.Value,
    positions: ir.Value,
    last: ir.Value,
    heads_axis: ir.Value,
    **_: Any,
) -> pattern.MatchResult:
    result = pattern.MatchResult()
    if ints(last) != [-1] or ints(heads_axis) != [1]:
        return result.fail("the angles are not broadcast over the heads axis", heads_axis)
    if x.shape is None or len(x.shape) != 4:
        return result.fail("the rotated value is not 4-D", x)
    half = (last_dim(x) or 0) // 2
    for table in (cos, sin):
        if not table.is_initializer() or last_dim(table) != half:
            return result.fail("the table is not stored, or not h/2 wide", table)
    return result


def _replace(op: Any, x: ir.Value, cos: ir.Value, sin: ir.Value, positions: ir.Value, **_: Any) -> Any:
    return op.RotaryEmbedding(x, cos, sin, positions)


RULE = pattern.RewriteRule(_rotation, _replace, _check, name="RotaryEmbedding", remove_nodes=False)


def fuse_rotary(model: ir.Model) -> int:
    """Fuses every rotation; returns how many (2 · layers: queries and keys)."""
    return apply(model, [RULE])
