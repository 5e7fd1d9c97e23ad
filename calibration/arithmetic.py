"""How a product x · Wᵀ rounds what goes into it, and how far that takes the result from the exact one.

Symbols in shape comments: n tokens, N rows of a weight (or some of them), K columns.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from gemma_export.calibration.slices import in_row_slices
from gemma_export.graphs.formats import Form, Rounding, WeightFormat
from gemma_export.graphs.quantization import round_per_block, round_per_tensor, round_per_token, round_trip
from gemma_export.graphs.quantized import SLICE_VALUES

InputRounding = Literal["none", "token", "block", "tensor"]


@dataclass(frozen=True)
class Arithmetic:
    """How one product is computed.

    Attributes:
        form: Its form.
        weights: The format of W.
        input_rounding: How x is rounded to 8 bits on the way in: not at all, with a scale per token, with a
            scale per token and block of columns (MatMulNBits at accuracy level 4), or with one scale.
        input_scale: That scale.
    """

    form: Form
    weights: WeightFormat
    input_rounding: InputRounding = "none"
    input_scale: float | None = None

    def with_input_scale(self, scale: float) -> "Arithmetic":
        """The same with a scale for x."""
        return replace(self, input_scale=scale)

    def round_input(self, x: Tensor) -> Tensor:
        """What the product computes with instead of x [n, K]."""
        match self.input_rounding:
            case "none":
                return x
            case "token":
                return _row_by_row(round_per_token, x)
            case "block":
                return _row_by_row(lambda rows: round_per_block(rows, self.weights), x)
            case "tensor":
                scale = self.input_scale
                assert scale is not None
                return _row_by_row(lambda rows: round_per_tensor(rows, scale), x)

    def round_weight(self, rows: Tensor, rounding: Rounding = "nearest") -> Tensor:
        """What the product computes with instead of rows [N, K] of W: fp32."""
        return _row_by_row(lambda part: round_trip(part, self.weights, rounding), rows)


def _row_by_row(rounding: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
    """A matrix [n, K] rounded, as rows can be without each other: fp32.

    A search for scales goes over its numbers a hundred times: out of memory that takes ten times as long.
    """
    rounded = torch.empty_like(rows, dtype=torch.float32)

    def work(start: int, stop: int) -> None:
        rounded[start:stop] = rounding(rows[start:stop])

    in_row_slices(work, len(rows), max(1, SLICE_VALUES // rows.shape[1]))
    return rounded


class Target:
    """The exact outputs that others are held against.

    An error counts in relation to the output of its own token: what follows is a norm or a sum with the
    residual stream, for which a token with large outputs matters no more than another.

    Args:
        x: Inputs [n, K].
        rows: Rows of W [N, K].
    """

    # A token whose outputs are this small beside the others' adds next to nothing to the residual stream.
    _SMALLEST_OUTPUT = 1e-3

    def __init__(self, x: Tensor, rows: Tensor) -> None:
        self._outputs = x @ rows.T
        size = self._outputs.square().sum(1)
        self._size = size.clamp_min(self._SMALLEST_OUTPUT * float(size.median())).clamp_min(1e-30)

    def error(self, x: Tensor, rows: Tensor) -> float:
        """Squared error / squared output of a product of other inputs and rows, the mean over tokens."""
        difference = torch.addmm(self._outputs, x, rows.T, beta=-1)
        return float((difference.square().sum(1) / self._size).mean())
