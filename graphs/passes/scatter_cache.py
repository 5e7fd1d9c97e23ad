"""A write into a cache at given positions becomes a TensorScatter at the first of them.

    ScatterElements(cache, Expand(slots[:, None, :, None]), new, axis=2)
        →  TensorScatter(cache, new, slots[:, 0], axis=-2, mode="linear")

where slots is `position_ids`, or for a rolling cache of S slots `position_ids` mod S, plus one number for
each row. A TensorScatter whose input and output share a buffer writes the new rows and nothing else. The mode
that would wrap is not used, since TensorRT has none: who runs the graph ends a step where the cache ends.

Illegal when:
  (1) the indices are neither: only of `position_ids` does the contract say that a row's values are
      consecutive, which is what makes the first one enough;
  (2) the write reduces (adds, multiplies) into the cache, or runs along another axis than the slots;
  (3) the cache is not a graph input.
"""

from typing import Any

import onnx_ir as ir
from onnxscript.rewriter import pattern

from gemma_export.graphs.passes.patterns import apply, ints, last_dim


def _write(op: Any, cache: Any, positions: Any, heads_axis: Any, last_axis: Any, shape: Any, new: Any) -> Any:
    index = op.Unsqueeze(op.Unsqueeze(positions, heads_axis), last_axis)
    return op.ScatterElements(cache, op.Expand(index, shape), new, axis=2, reduction="none")


def _check(
    context: Any,
    cache: ir.Value,
    positions: ir.Value,
    heads_axis: ir.Value,
    last_axis: ir.Value,
    **_: Any,
) -> pattern.MatchResult:
    result = pattern.MatchResult()
    if not _are_slots(positions, cache):
        return result.fail("the indices are not position_ids, so they need not be consecutive", positions)
    if ints(heads_axis) != [1] or ints(last_axis) != [3]:
        return result.fail("the indices do not run along the slots", positions)
    if not cache.is_graph_input():
        return result.fail("what is written into is not a cache input", cache)
    return result


def _are_slots(value: ir.Value, cache: ir.Value) -> bool:
    """Whether a value is where the positions of a step lie in a cache."""
    node = value.producer()
    if node is None:
        return value.is_graph_input() and value.name == "position_ids"
    slots, other = (*node.inputs, None)[:2]
    if slots is None or other is None:
        return False
    if node.op_type == "Add":
        return last_dim(other) == 1 and _are_slots(slots, cache)
    sizes = cache.shape[2:3] if cache.shape is not None else ()
    return node.op_type == "Mod" and ints(other) == list(sizes) and _are_slots(slots, cache)


def _replace(op: Any, cache: ir.Value, positions: ir.Value, new: ir.Value, **_: Any) -> Any:
    zero = op.Constant(value=ir.tensor(0))
    first = op.Gather(positions, zero, axis=1)  # [B]
    zero.dtype = first.dtype = ir.DataType.INT64
    return op.TensorScatter(cache, new, first, axis=-2, mode="linear")


RULE = pattern.RewriteRule(_write, _replace, _check, name="TensorScatter", remove_nodes=False)


def scatter_cache(model: ir.Model) -> int:
    """Rewrites every cache write; returns how many (2 · layers)."""
    return apply(model, [RULE])
