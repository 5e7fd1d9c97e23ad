"""Smoothing: a vector that makes a layer's input easier to round, and its weight hardly harder.

x · Wᵀ = (x / s) · (W · s)ᵀ for any positive s, a number per channel. What makes x is divided by s once and
for all (a norm's gain, or the rows of the projection before), so nothing is added to the graph. Two families
of vectors are tried, each at several strengths a, and whichever leaves the least error is taken:

    SmoothQuant (arXiv 2211.10438)   s = max|x|^a / max|w|^(1 - a)    shares the difficulty between x and W
    AWQ (arXiv 2306.00978)           s = mean|x|^a                    spares the columns that x makes matter
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from gemma_export.calibration.statistics import InputStatistics

Family = Literal["smoothquant", "awq"]

COARSE, FINE = 10, 20
"""Strengths are first tried in steps of 1 / COARSE, then a step of 1 / FINE beside the best of them."""
WORTHWHILE = 0.98
"""How much of the error may remain for a vector to be taken: less of a gain is a matter of the sample."""
FARTHEST = 1e4
"""What a channel is divided or multiplied by at most, so that no gain leaves the range of 16 bits."""
_SMALLEST = 1e-8

ErrorOf = Callable[[Tensor | None], float]
"""The error of the outputs with a vector s [K], or with none."""


@dataclass(frozen=True)
class Smoothing:
    """A vector and what it is good for.

    Attributes:
        name: The family and the strength, or `none`.
        vector: s, fp32 [K], that x is divided by; None for none.
        error: The error of the outputs that remains.
        plain: The error without a vector.
    """

    name: str
    vector: Tensor | None
    error: float
    plain: float


class Vectors:
    """The vectors that can be tried for one layer.

    Args:
        inputs: What the layer reads, of K channels.
        columns: The largest magnitude of each column of W: fp32 [K].
    """

    def __init__(self, inputs: InputStatistics, columns: Tensor) -> None:
        self._largest = inputs.absmax.clamp_min(_SMALLEST)
        self._mean = inputs.mean_magnitude.clamp_min(_SMALLEST)
        self._columns = columns.clamp_min(_SMALLEST)

    def vector(self, family: Family, strength: float) -> Tensor:
        """s, fp32 [K], scaled so that the largest and the smallest are equally far from 1."""
        if family == "awq":
            vector = self._mean**strength
        else:
            vector = self._largest**strength / self._columns ** (1 - strength)
        vector = vector / (vector.max().sqrt() * vector.min().sqrt())
        return vector.clamp(1 / FARTHEST, FARTHEST)


def search(vectors: Vectors | None, error_of: ErrorOf) -> Smoothing:
    """The vector that leaves the least error; none where no vector is worthwhile, or can be used at all."""
    plain = error_of(None)
    none = Smoothing("none", None, plain, plain)
    if vectors is None:
        return none
    tried: dict[tuple[Family, int], Smoothing] = {}

    def attempt(family: Family, step: int) -> None:
        vector = vectors.vector(family, step / FINE)
        tried[family, step] = Smoothing(f"{family} {step / FINE:g}", vector, error_of(vector), plain)

    stride = FINE // COARSE
    for family in get_args(Family):
        for step in range(stride, FINE + 1, stride):
            attempt(family, step)
    family, step = min(tried, key=lambda key: tried[key].error)
    for beside in (step - 1, step + 1):
        if 1 <= beside <= FINE:
            attempt(family, beside)
    best = min(tried.values(), key=lambda smoothing: smoothing.error)
    return best if best.error < WORTHWHILE * plain else none
