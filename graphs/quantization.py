"""The arithmetic of quantized weights: what is stored for a row of fp32 numbers, and what comes back.

A weight W [N, K] becomes codes (int8 [N, K], whatever their width) and scales (fp32 [N, K / block]):
W ≈ codes · scales, each scale standing for `block` consecutive columns of its row. Zero is the code 0
everywhere, so there is no zero point.

Scales of blocks are rounded to the digits of bfloat16 before any code is chosen: what is stored in 16 bits is
then what the codes were made for. bfloat16 has the range of fp32; fp16 holds the same numbers from 2⁻¹⁷ on.

Symbols in shape comments: R rows of a block that is read, N rows in all, K columns, G = K / block groups.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from gemma_export.graphs.formats import Form, Rounding, WeightFormat
from gemma_export.graphs.tensors import RowSource

SMALLEST_SCALE = 2.0**-100
"""Of a group of zeros or subnormals: its codes are 0, and the quotient stays finite."""


@dataclass(frozen=True)
class LinearQuantization:
    """How one linear layer, or the embedding table, is quantized.

    Attributes:
        form: How the product is computed.
        format: Of the weight; None where it stays a 16-bit number.
        rounding: How scales are chosen where they are not stored.
        activation_scale: Scale of x in the form `w8a8-tensor`: x ≈ codes · scale.
        stored: Codes int8 [N, K] and scales fp32 [N, G] where calibration has chosen every code (GPTQ); the
            scales have no more digits than the format lets them.
    """

    form: Form
    format: WeightFormat | None = None
    rounding: Rounding = "nearest"
    activation_scale: float | None = None
    stored: tuple[RowSource, RowSource] | None = None


@dataclass(frozen=True)
class Quantization:
    """How a whole graph is quantized.

    Attributes:
        smoothing: By the name of what makes x: the vector fp32 [K] that x is divided by, and that the columns
            of the weights reading x are multiplied with.
        linears: By the name of a linear layer or of the embedding table; every one of the graph.
    """

    smoothing: Mapping[str, Tensor]
    linears: Mapping[str, LinearQuantization]


def _grouped(rows: Tensor, form: WeightFormat) -> Tensor:
    """[R, K] as [R, G, block]."""
    return rows.reshape(rows.shape[0], form.groups(rows.shape[1]), -1)


def shortened(scales: Tensor, form: WeightFormat) -> Tensor:
    """Scales fp32 with as many digits as the format stores, rounded to nearest even: fp32."""
    return scales.bfloat16().float() if form.short_scales else scales


def nearest_scales(rows: Tensor, form: WeightFormat) -> Tensor:
    """Scales fp32 [R, G] of rows [R, K] with which nothing is clipped by more than rounding changes it."""
    largest = _grouped(rows.float(), form).abs().amax(-1)
    return shortened((largest / form.highest).clamp_min(SMALLEST_SCALE), form)


def mse_scales(rows: Tensor, form: WeightFormat, steps: int = 16, narrowest: float = 0.7) -> Tensor:
    """Scales fp32 [R, G] of rows [R, K] with the least squared error among some that clip a little.

    Tried are `steps` sizes of a code's step, from the one that puts the largest absolute value at the highest
    code down to `narrowest` times the one that puts it at the last. Where the format allows negative scales,
    the sign puts the lowest code, of which there is one more, on the side of the largest value.
    """
    groups = _grouped(rows.detach().float(), form)  # [R, G, b]
    end = _ends(groups, form)
    nothing = end.abs() < SMALLEST_SCALE
    end = torch.where(nothing, 1.0, end)
    # Every group is brought to [-1, 1], the largest value at -1 where the sign may be chosen: a squared error
    # cannot overflow.
    unit = groups / end[..., None]
    rounded = torch.empty_like(unit)
    best = shortened(end / form.highest, form)
    best_error = torch.full_like(end, torch.inf)
    for codes in _tried(form, steps, narrowest):
        scales = shortened(end / codes, form)
        step = (scales / end)[..., None]
        torch.div(unit, step, out=rounded).round_().clamp_(form.lowest, form.highest)
        torch.addcmul(unit, rounded, step, value=-1, out=rounded)
        error = torch.linalg.vector_norm(rounded, dim=-1)
        torch.where(error < best_error, scales, best, out=best)
        torch.minimum(best_error, error, out=best_error)
    return torch.where(nothing | (best.abs() < SMALLEST_SCALE), SMALLEST_SCALE, best)


def _ends(groups: Tensor, form: WeightFormat) -> Tensor:
    """The largest absolute value of each group [R, G, b], with the sign that its scale is to have."""
    if not form.negative_scales:
        return groups.abs().amax(-1)
    highest, lowest = groups.amax(-1), groups.amin(-1)
    return torch.where(highest > -lowest, -highest, -lowest)


def _tried(form: WeightFormat, steps: int, narrowest: float) -> list[float]:
    """How many steps of a code the largest value may be wide, the fewest first."""
    last = -form.lowest if form.negative_scales else form.highest
    widest, finest = 1 / form.highest, narrowest / last
    sizes = [widest + (finest - widest) * i / max(1, steps - 1) for i in range(steps)]
    # The ends themselves, exactly: weights that are codes times a scale come back as they were.
    return sorted({float(form.highest), float(last), *(1 / size for size in sizes[1:])})


def scales_for(rows: Tensor, form: WeightFormat, rounding: Rounding) -> Tensor:
    """Scales fp32 [R, G] of rows [R, K]."""
    return nearest_scales(rows, form) if rounding == "nearest" else mse_scales(rows, form)


def encode(rows: Tensor, scales: Tensor, form: WeightFormat) -> Tensor:
    """Codes int8 [R, K] of rows [R, K], rounded to nearest even and saturated."""
    quotient = _grouped(rows.float(), form) / scales[..., None]
    return quotient.round_().clamp_(form.lowest, form.highest).to(torch.int8).reshape(rows.shape)


def decode(codes: Tensor, scales: Tensor, form: WeightFormat) -> Tensor:
    """Numbers fp32 [R, K] that codes stand for."""
    return (_grouped(codes.float(), form) * scales[..., None]).reshape(codes.shape)


def round_trip(rows: Tensor, form: WeightFormat, rounding: Rounding = "nearest") -> Tensor:
    """What rows [R, K] become once they have been stored: fp32 [R, K]."""
    scales = scales_for(rows, form, rounding)
    return decode(encode(rows, scales, form), scales, form)


def round_per_token(x: Tensor, block: int | None = None) -> Tensor:
    """Activations [..., K] rounded to 8 bits, with a scale per token (or per block of each token): fp32.

    This is what the form `w8a8-token` does.
    """
    groups = x if block is None else x.reshape(*x.shape[:-1], -1, block)
    scale = (groups.abs().amax(-1, keepdim=True) / 127).clamp_min(SMALLEST_SCALE)
    return ((groups / scale).round_().clamp_(-128, 127) * scale).reshape(x.shape)


def round_per_block(x: Tensor, form: WeightFormat) -> Tensor:
    """Activations [..., K] rounded to 8 bits as MatMulNBits (accuracy level 4) does for such a weight: fp32.

    There is a scale for each token and each block of columns that it takes together.
    """
    return round_per_token(x, form.product_block(x.shape[-1]))


def round_per_tensor(x: Tensor, scale: float) -> Tensor:
    """Activations [..., K] rounded to 8 bits with one scale: fp32."""
    return (x / scale).round_().clamp_(-128, 127) * scale


def pack_nibbles(codes: Tensor) -> Tensor:
    """Codes of 4 bits (int8 [.., K], K even) two to a byte, the first in the low half: uint8 [.., K / 2]."""
    # Two codes are read as one number of 16 bits: strided halves would take four times as long.
    pairs = codes.contiguous().view(torch.int16)
    return (pairs >> 4).bitwise_and_(0xF0).bitwise_or_(pairs & 0xF).to(torch.uint8)
