"""Which passes run for which target, in which order, and how often each must fire.

A fusion that fires less often than it should is how a wrong or slow graph comes to be, silently; here it is
an error that names the pass.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial

import onnx_ir as ir
import torch

from gemma_export.errors import GraphError
from gemma_export.graphs import spec, spec_cuda, spec_tensorrt
from gemma_export.graphs.formats import TABLE, TURING, Form
from gemma_export.graphs.passes.compute_rotary_tables import compute_rotary_tables
from gemma_export.graphs.passes.decompose_attention import count_soft_caps, decompose_attention
from gemma_export.graphs.passes.fix_total_length import fix_total_length
from gemma_export.graphs.passes.flatten_tokens import flatten_tokens
from gemma_export.graphs.passes.fold_channel_scales import fold_channel_scales
from gemma_export.graphs.passes.fold_norm_gain import fold_norm_gain
from gemma_export.graphs.passes.fold_reshape import fold_reshape
from gemma_export.graphs.passes.fuse_attention import fuse_attention
from gemma_export.graphs.passes.fuse_functions import fuse_gated_gelu, fuse_residual_norm
from gemma_export.graphs.passes.fuse_rms_norm import fuse_rms_norm
from gemma_export.graphs.passes.fuse_rotary import fuse_rotary
from gemma_export.graphs.passes.half_precision import half_precision
from gemma_export.graphs.passes.keep_codes import keep_codes
from gemma_export.graphs.passes.lower_group_query_attention import lower_group_query_attention
from gemma_export.graphs.passes.lower_linear import lower_linear
from gemma_export.graphs.passes.merge_gate_up import merge_gate_up
from gemma_export.graphs.passes.merge_projections import merge_projections
from gemma_export.graphs.passes.name_values import name_values
from gemma_export.graphs.passes.quantize_dequantize import quantize_dequantize
from gemma_export.graphs.passes.quantize_embedding import quantize_embedding
from gemma_export.graphs.passes.quantize_linear import quantize_linear
from gemma_export.graphs.passes.quantized_layers import TAKES_X
from gemma_export.graphs.passes.remove_dead_code import remove_dead_code
from gemma_export.graphs.passes.reshape_gate_up import reshape_gate_up
from gemma_export.graphs.passes.scale_products import scale_products
from gemma_export.graphs.passes.scatter_cache import scatter_cache
from gemma_export.graphs.passes.share_embedding import share_embedding
from gemma_export.graphs.passes.store_half import store_half
from gemma_export.graphs.passes.transpose_lookup import transpose_lookup
from gemma_export.graphs.quantization import Quantization

Pass = Callable[[ir.Model], int]
PassReport = dict[str, int]
"""How often each pass fired, in the order they ran."""


@dataclass(frozen=True)
class Step:
    """A pass, and how often it fires on a decoder of n layers (None: as often as it likes).

    Where something else than layers is counted, `count` does.
    """

    run: Pass
    expected: Callable[[int], int] | None = None
    count: Callable[[ir.Model], int] = spec.num_layers

    @property
    def name(self) -> str:
        """The pass's."""
        run = self.run.func if isinstance(self.run, partial) else self.run
        return str(run.__name__)


@dataclass(frozen=True)
class Formats:
    """The formats of a lowered graph's numbers, and the GPUs that must have them.

    Attributes:
        storage: Of the weights that are not quantized.
        compute: Of the arithmetic and of the cache, products of integers aside.
        keep: Initializers (where only the storage is narrow) or values (where the arithmetic is) that stay
            in fp32.
        quantization: How weights and products are quantized; None where they are not.
        sms: Compute capabilities that the graph is compiled for, as in 89 for 8.9, where they are known.
    """

    storage: torch.dtype
    compute: torch.dtype
    keep: Collection[str] = ()
    quantization: Quantization | None = None
    sms: Collection[int] = ()

    @property
    def forms(self) -> dict[str, Form]:
        """What becomes of each linear layer and the table, by name; empty where nothing is quantized."""
        linears = {} if self.quantization is None else self.quantization.linears
        return {name: how.form for name, how in linears.items()}


@dataclass(frozen=True)
class Schedule:
    """The passes of a lowering, in order, and the rules that its graph keeps."""

    steps: tuple[Step, ...]
    rules: spec.Spec


def _twice(n: int) -> int:
    return 2 * n


def _once_each(n: int) -> int:
    return n


def _once_a_layer(n: int) -> int:
    return n


def _products(n: int) -> int:
    return 4 * n + 1


def _two(n: int) -> int:
    return 2


def _once(n: int) -> int:
    return 1


CANONICAL = (
    Step(fold_reshape),
    Step(fold_norm_gain, _once_each, spec.num_norms),
    Step(fuse_rms_norm, _once_each, spec.num_norms),
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

FUNCTIONS = (
    Step(fuse_gated_gelu, _once_a_layer),
    Step(fuse_residual_norm),
)
"""What kernels of our own compute at once."""

ONNXRUNTIME = (
    Step(lower_group_query_attention, _once_a_layer),
    Step(lower_linear, _products),
    Step(remove_dead_code),
)
"""The canonical graph → operators that onnxruntime has on a CPU and on a GPU."""


def cpu(formats: Formats) -> Schedule:
    """The canonical graph → what onnxruntime's CPU provider runs best.

    It has no 16-bit arithmetic: the format of `compute` is fp32, whatever is stored.
    """
    narrow = partial(store_half, dtype=formats.storage, keep=formats.keep)
    storage = () if formats.storage == torch.float32 else (Step(narrow),)
    if formats.quantization is None:
        return Schedule((*ONNXRUNTIME, *FUNCTIONS, *storage), spec.CPU)
    linears = formats.quantization.linears
    floats = sum(form == "float" for form in formats.forms.values())
    steps = (
        *_scaled(formats.quantization),
        Step(lower_group_query_attention, _once_a_layer),
        # The layers before the table: it is its lookup that tells the head from a layer.
        Step(partial(quantize_linear, linears=linears)),
        Step(partial(quantize_embedding, linears=linears)),
        Step(lower_linear, lambda n: floats),
        Step(compute_rotary_tables, _two),
        Step(remove_dead_code),
        *FUNCTIONS,
        *storage,
    )
    return Schedule(steps, spec.cpu_quantized(formats.forms))


def cuda(formats: Formats) -> Schedule:
    """The canonical graph → what onnxruntime's CUDA provider runs best: that of a CPU, in 16 bits."""
    half = partial(half_precision, dtype=formats.compute, keep=formats.keep)
    if formats.quantization is None:
        plain = (*ONNXRUNTIME, Step(fix_total_length, _once_a_layer), Step(half), Step(remove_dead_code))
        return Schedule(plain, spec_cuda.CUDA)
    linears = formats.quantization.linears
    floats = sum(form == "float" for form in formats.forms.values())
    steps = (
        *_scaled(formats.quantization),
        Step(lower_group_query_attention, _once_a_layer),
        Step(fix_total_length, _once_a_layer),
        Step(partial(quantize_linear, linears=linears, accuracy_level=TAKES_X)),
        Step(partial(quantize_embedding, linears=linears, accuracy_level=TAKES_X)),
        Step(lower_linear, lambda n: floats),
        Step(half),
        Step(remove_dead_code),
    )
    return Schedule(steps, spec_cuda.cuda_quantized(formats.forms))


def tensorrt(formats: Formats) -> Schedule:
    """The canonical graph → standard operators in the spelling that TensorRT fuses.

    Of both flavours: TensorRT, and TensorRT for RTX. It is also what the target `onnx` is, for a device to
    compile.
    """
    capped = partial(count_soft_caps, keep=formats.keep)
    steps: tuple[Step, ...] = (
        Step(partial(decompose_attention, keep=formats.keep), _once_each, capped),
        Step(flatten_tokens, _products),
        Step(reshape_gate_up, _once_a_layer),
        Step(remove_dead_code),
    )
    rules = spec_tensorrt.TENSORRT
    if formats.quantization is not None:
        quantize = partial(quantize_dequantize, quantization=formats.quantization)
        tables = int(formats.forms.get(TABLE) != "float")
        steps = (
            # First: scales are folded into gate and up as the canonical graph splits them.
            *_scaled(formats.quantization),
            *steps,
            Step(quantize),
            Step(transpose_lookup, lambda n: tables),
            Step(remove_dead_code),
        )
        rules = spec_tensorrt.quantized(formats.forms)
    if formats.compute == torch.float16:
        steps += (Step(partial(scale_products, keep=formats.keep)),)
    if formats.compute != torch.float32:
        half = partial(half_precision, dtype=formats.compute, keep=formats.keep)
        steps += (Step(half), Step(remove_dead_code))
    if TURING in formats.sms:
        weight_only = sum(name.endswith(".o_proj") and form == "w8" for name, form in formats.forms.items())
        # Of attention in parts, the heads come out of arithmetic already.
        steps += (Step(keep_codes, lambda fused: min(fused, weight_only), spec.num_attentions),)
    return Schedule(steps, rules)


def compiled(formats: Formats) -> Schedule:
    """TensorRT's schedule, for a build that compiles its graph.

    Raises:
        GraphError: An attention is to be in fp32; other runtimes have a kernel for that, TensorRT has none.
    """
    for name in sorted(formats.keep):
        if name.endswith(".attention"):
            raise GraphError(
                f"{name} leaves the range of fp16, and TensorRT computes no attention in fp32.",
                "Build with --precision bf16, which has the range of fp32.",
            )
    return tensorrt(formats)


LOWERINGS: dict[str, Callable[[Formats], Schedule]] = {
    "cpu": cpu,
    "cuda": cuda,
    "onnx": tensorrt,
    "rtx": compiled,
    "tensorrt": compiled,
}
"""What makes a target's schedule, by target."""


def _scaled(quantization: Quantization) -> tuple[Step, ...]:
    """Folding the channels' scales into the weights, while these are still numbers."""
    smoothing = quantization.smoothing
    return (Step(partial(fold_channel_scales, smoothing=smoothing), lambda n: len(smoothing)),)


def canonicalize(model: ir.Model) -> PassReport:
    """Turns the traced graph with bound weights into the canonical graph, in place."""
    spec.RAW.check(model)
    report = run(model, CANONICAL)
    spec.CANONICAL.check(model)
    return report


def lower(
    model: ir.Model,
    target: str,
    storage: torch.dtype,
    compute: torch.dtype,
    keep: Collection[str] = (),
    quantization: Quantization | None = None,
    sms: Collection[int] = (),
) -> PassReport:
    """Turns the canonical graph into what a target takes, in place.

    Args:
        model: The canonical graph, in fp32.
        target: A key of `LOWERINGS`.
        storage: Format of the weights that are not quantized.
        compute: Format of the arithmetic and of the cache, products of integers aside.
        keep: Initializers (where only the storage is narrow) or values (where the arithmetic is) that stay
            in fp32.
        quantization: How weights and products are quantized; None where they are not.
        sms: Compute capabilities that the graph is compiled for, where they are known.

    Raises:
        GraphError: The graph, or what was chosen for it, is not what a pass or a rule wants.
    """
    schedule = LOWERINGS[target](Formats(storage, compute, keep, quantization, sms))
    report = run(model, schedule.steps)
    schedule.rules.check(model)
    return report


def run(model: ir.Model, steps: tuple[Step, ...]) -> PassReport:
    """Runs the steps in order.

    Raises:
        GraphError: A pass fired another number of times than it must; the passes before it are named.
    """
    layers = spec.num_layers(model)
    report: PassReport = {}
    for step in steps:
        name = step.name
        expected = None if step.expected is None else step.expected(step.count(model))
        count = step.run(model)
        if expected is not None and count != expected:
            raise GraphError(
                f"The pass {name} fired {count} times on {layers} layers instead of {expected}"
                f" (after {', '.join(report) or 'no other'}).",
                "The traced graph has another form than the pass knows: this is a defect, please report it.",
            )
        report[name] = report.get(name, 0) + count
    return report
