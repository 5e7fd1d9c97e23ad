"""Which passes run for which target, in which order, and how often each must fire.

A fusion that fires less often than it should is how a wrong or slow graph comes to be, silently; here it is
an error that names the pass.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass

import onnx_ir as ir
import torch

from gemma_export.errors import GraphError
from gemma_export.graphs import spec
from gemma_export.graphs.passes.fold_norm_gain import fold_norm_gain
from gemma_export.graphs.passes.fold_reshape import fold_reshape
from gemma_export.graphs.passes.fuse_attention import fuse_attention
from gemma_export.graphs.passes.fuse_rms_norm import fuse_rms_norm
from gemma_export.graphs.passes.fuse_rotary import fuse_rotary
from gemma_export.graphs.passes.half_precision import half_precision
from gemma_export.graphs.passes.lower_group_query_attention import lower_group_query_attention
from gemma_export.graphs.passes.lower_linear import lower_linear
from gemma_export.graphs.passes.merge_gate_up import merge_gate_up
from gemma_export.graphs.passes.merge_projections import merge_projections
from gemma_export.graphs.passes.name_values import name_values
from gemma_export.graphs.passes.remove_dead_code import remove_dead_code
from gemma_export.graphs.passes.scatter_cache import scatter_cache
from gemma_export.graphs.passes.share_embedding import share_embedding
from gemma_export.graphs.passes.store_half import store_half

Pass = Callable[[ir.Model], int]
PassReport = dict[str, int]
"""How often each pass fired, in the order they ran."""


@dataclass(frozen=True)
class Step:
    """A pass, and how often it fires on a decoder of n layers (None: as often as it likes)."""

    run: Pass
    expected: Callable[[int], int] | None = None


def _twice(n: int) -> int:
    return 2 * n


def _norms(n: int) -> int:
    return 2 * n + 1


def _once_a_layer(n: int) -> int:
    return n


def _products(n: int) -> int:
    return 4 * n + 1


def _once(n: int) -> int:
    return 1


CANONICAL = (
    Step(fold_reshape),
    Step(fold_norm_gain, _norms),
    Step(fuse_rms_norm, _norms),
    Step(fuse_rotary, _twice),
    Step(scatter_cache, _twice),
    Step(fuse_attention, _once_a_layer),
    Step(merge_projections, _once_a_layer),
    Step(merge_gate_up, _once_a_layer),
    Step(share_embedding, _once),
    Step(remove_dead_code),
    Step(name_values),
)
"""The traced graph → the canonical graph: standard operators only."""

CPU = (
    Step(lower_group_query_attention, _once_a_layer),
    Step(lower_linear, _products),
    Step(remove_dead_code),
)
"""The canonical graph → what onnxruntime's CPU provider runs best."""


def canonicalize(model: ir.Model) -> PassReport:
    """Turns the traced graph with bound weights into the canonical graph, in place."""
    spec.RAW.check(model)
    report = run(model, CANONICAL)
    spec.CANONICAL.check(model)
    return report


def lower(
    model: ir.Model, target: str, storage: torch.dtype, compute: torch.dtype, keep: Collection[str] = ()
) -> PassReport:
    """Turns the canonical graph into what a target takes, in place.

    Args:
        model: The canonical graph, in fp32.
        target: `cpu` or `onnx`.
        storage: Format of the weights.
        compute: Format of the arithmetic and of the cache.
        keep: Initializers (where only the storage is narrow) or values (where the arithmetic is) that stay
            in fp32.
    """
    report: PassReport = {}
    if target == "cpu":
        report |= run(model, CPU)
        if storage != torch.float32:
            report["store_half"] = store_half(model, storage, keep)
        spec.CPU.check(model)
    elif compute != torch.float32:
        report["half_precision"] = half_precision(model, compute, keep)
        remove_dead_code(model)
        spec.HALF.check(model)
    return report


def run(model: ir.Model, steps: tuple[Step, ...]) -> PassReport:
    """Runs the steps in order.

    Raises:
        GraphError: A pass fired another number of times than it must; the passes before it are named.
    """
    layers = spec.num_layers(model)
    report: PassReport = {}
    for step in steps:
        name = step.run.__name__
        count = step.run(model)
        if step.expected is not None and count != step.expected(layers):
            raise GraphError(
                f"The pass {name} fired {count} times on {layers} layers instead of {step.expected(layers)}"
                f" (after {', '.join(report) or 'no other'}).",
                "The traced graph has another form than the pass knows: this is a defect, please report it.",
            )
        report[name] = count
    return report
