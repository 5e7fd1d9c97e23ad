"""The plain operators of an RMSNorm become one RMSNormalization.

    x · Reciprocal(Sqrt(ReduceMean(x², -1) + eps)) · gain  →  RMSNormalization(x, gain, axis=-1, epsilon=eps)

Illegal when:
  (1) the mean is over another axis than the last, or drops it;
  (2) the exponent is not 2, or epsilon is not one positive number;
  (3) the gain is computed, or is not one value per channel.
"""

from typing import Any

import onnx_ir as ir
from onnxscript.rewriter import pattern

from gemma_export.graphs.passes.patterns import apply, ints, last_dim, scalar


def _rms_norm(op: Any, x: Any, exponent: Any, axes: Any, epsilon: Any, gain: Any) -> Any:
    mean_square = op.ReduceMean(op.Pow(x, exponent), axes, _allow_other_attributes=True)
    scale = op.Reciprocal(op.Sqrt(op.Add(mean_square, epsilon)))
    return op.Mul(op.Mul(x, scale), gain)


def _check(
    context: Any, x: ir.Value, exponent: ir.Value, axes: ir.Value, epsilon: ir.Value, gain: ir.Value, **_: Any
) -> pattern.MatchResult:
    result = pattern.MatchResult()
    if scalar(exponent) != 2.0:
        return result.fail("the exponent is not 2", exponent)
    if ints(axes) != [-1]:
        return result.fail("the mean is not over the last axis", axes)
    if not (scalar(epsilon) or 0.0) > 0.0:
        return result.fail("epsilon is not one positive number", epsilon)
    if not gain.is_initializer() or gain.shape is None or list(gain.shape) != [last_dim(x)]:
        return result.fail("the gain is not one stored value per channel", gain)
    return result


def _replace(op: Any, x: ir.Value, epsilon: ir.Value, gain: ir.Value, **_: Any) -> Any:
    return op.RMSNormalization(x, gain, axis=-1, epsilon=scalar(epsilon))


RULE = pattern.RewriteRule(_rms_norm, _replace, _check, name="RMSNorm", remove_nodes=False)


def fuse_rms_norm(model: ir.Model) -> int:
    """Fuses every RMSNorm; returns how many (2 · layers + 1)."""
    return apply(model, [RULE])
