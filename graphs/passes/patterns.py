"""What the passes share: reading constants and attributes, and applying a rewrite rule with a count."""

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from onnxscript.rewriter import pattern


def constant(value: ir.Value | None) -> np.ndarray | None:
    """The value's constant as an array, or None where it is computed, or is a weight."""
    if value is None or value.const_value is None or value.const_value.size > 64:
        return None
    return value.const_value.numpy()


def scalar(value: ir.Value | None) -> float | None:
    """The value's constant where that is a single number, else None."""
    array = constant(value)
    return None if array is None or array.size != 1 else float(array.reshape(()))


def ints(value: ir.Value | None) -> list[int] | None:
    """The value's constant as a list of integers, else None."""
    array = constant(value)
    return None if array is None else [int(x) for x in array.reshape(-1)]


def last_dim(value: ir.Value) -> int | None:
    """The static size of the last axis, or None."""
    if value.shape is None or not value.shape:
        return None
    size = value.shape[-1]
    return size if isinstance(size, int) else None


def users(value: ir.Value) -> list[ir.Node]:
    """The nodes that read a value, once per input that does."""
    return [use.node for use in value.uses()]


def stand_in(new: ir.Value, old: ir.Value) -> None:
    """Gives a value that will replace another its name, shape and format."""
    new.name, new.shape = old.name, old.shape
    if old.dtype is not None:
        new.dtype = old.dtype


def apply(model: ir.Model, rules: Sequence[pattern.RewriteRule], *, commute: bool = False) -> int:
    """Applies the rules once over the graph and returns how often one fired."""
    return int(pattern.RewriteRuleSet(list(rules), commute=commute).apply_to_model(model))
