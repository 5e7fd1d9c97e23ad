"""Observers: how large the numbers of a tensor are, and from that the scale with which 8 bits hold them.

An observer is shown a tensor piece by piece and keeps a histogram of its magnitudes. What it proposes is
symmetric: x ≈ codes · scale with codes from -127 to 127, the threshold 127 · scale being the largest
magnitude that is not clipped. Zeros, which every scale holds exactly, have no say.

| observer | threshold |
|---|---|
| `absmax` | the largest magnitude: nothing is clipped |
| `percentile` | the magnitude that one value of 10,000 exceeds |
| `entropy` | where the rounded distribution is most like the real one: the calibrator of TensorRT |
| `mse` | where the squared error of rounding and clipping together is least |
"""

import math
from typing import Literal, Protocol, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gemma_export.errors import CalibrationError

ObserverName = Literal["absmax", "percentile", "entropy", "mse"]
OBSERVERS: tuple[ObserverName, ...] = get_args(ObserverName)

HIGHEST_CODE = 127
SMALLEST_SCALE = 1e-30
"""Of numbers next to nothing: the quotient by it stays finite."""
BINS = 2**15
"""With a threshold of a 64th of the largest magnitude, a code is still at least four bins wide."""

Counts = npt.NDArray[np.int64]


def check_finite(x: Tensor) -> None:
    """Refuses what no scale can be made of; a sum shows NaN and infinity at the cost of one read.

    Raises:
        CalibrationError: A value is NaN or infinite.
    """
    if torch.isfinite(x.sum(dtype=torch.float64)) or torch.isfinite(x).all():
        return
    raise CalibrationError(
        "An activation became NaN or infinite on the calibration text.",
        "The checkpoint is damaged or its training diverged: look at it with `--precision fp32` first.",
    )


def scale_of(threshold: float) -> float:
    """The scale that puts a threshold at the highest code; 1 where there was nothing but zeros."""
    return max(threshold / HIGHEST_CODE, SMALLEST_SCALE) if threshold > 0 else 1.0


class Observer(Protocol):
    """Sees a tensor piece by piece, and proposes one scale for all of it."""

    def add(self, x: Tensor) -> None:
        """Looks at some values, of any shape.

        Raises:
            CalibrationError: A value is NaN or infinite.
        """
        ...

    def scale(self) -> float:
        """The scale for 8 bits, positive; 1 where every value was zero, or nothing was seen."""
        ...


def make_observer(name: ObserverName) -> Observer:
    """A new observer."""
    kinds: dict[ObserverName, type[Observer]] = {
        "absmax": AbsmaxObserver,
        "percentile": PercentileObserver,
        "entropy": EntropyObserver,
        "mse": MSEObserver,
    }
    return kinds[name]()


class ChannelAbsmax:
    """The largest magnitude of every channel.

    Args:
        channels: Size of the last axis of what is observed.
    """

    def __init__(self, channels: int) -> None:
        self.largest = torch.zeros(channels)

    def add(self, x: Tensor) -> None:
        """Looks at values [..., channels].

        Raises:
            CalibrationError: A value is NaN or infinite.
        """
        check_finite(x)
        if x.numel():
            torch.maximum(self.largest, x.reshape(-1, x.shape[-1]).abs().amax(0).float(), out=self.largest)

    def scale(self) -> Tensor:
        """A scale for each channel, fp32 [channels]; 1 for a channel of zeros."""
        scales = (self.largest / HIGHEST_CODE).clamp_min(SMALLEST_SCALE)
        return torch.where(self.largest > 0, scales, 1.0)


class Histogram:
    """How often each magnitude was seen, in bins of one width from 0 up; zeros are left out.

    The width is a power of two. A value beyond the last bin doubles it as often as is needed, each time
    joining the bins two by two; since every edge stays an edge, the counts are those that one look at all
    values together would have given.

    Attributes:
        counts: Of the bin k, how many magnitudes were above k · width and at most (k + 1) · width.
        width: Of a bin; 0 before the first value that is not zero.
        largest: The largest magnitude.
    """

    def __init__(self, bins: int = BINS) -> None:
        self.counts: Counts = np.zeros(bins, np.int64)
        self.width = 0.0
        self.largest = 0.0

    def add(self, x: Tensor) -> None:
        """Counts values of any shape.

        Raises:
            CalibrationError: A value is NaN or infinite.
        """
        check_finite(x)
        magnitudes = x.detach().reshape(-1).abs()
        magnitudes = magnitudes[magnitudes > 0].double()
        if not magnitudes.numel():
            return
        self.largest = max(self.largest, float(magnitudes.max()))
        self._widen()
        # Exact: the width is a power of two.
        bins = torch.ceil(magnitudes / self.width).long() - 1
        self.counts += torch.bincount(bins, minlength=len(self.counts)).numpy()

    def _widen(self) -> None:
        bins = len(self.counts)
        needed = 2.0 ** math.ceil(math.log2(self.largest)) / bins
        if self.width == 0:
            self.width = needed
        elif needed > self.width:
            together = int(min(needed / self.width, bins))
            joined = self.counts.reshape(-1, together).sum(1)
            self.counts = np.zeros(bins, np.int64)
            self.counts[: len(joined)] = joined
            self.width = needed

    @property
    def used(self) -> int:
        """Bins up to the one of the largest magnitude."""
        return int(np.ceil(self.largest / self.width)) if self.width else 0

    def coarse(self, bins: int) -> "Histogram":
        """The same in fewer bins, a power of two."""
        together = len(self.counts) // bins
        result = Histogram(bins)
        result.counts = self.counts.reshape(bins, together).sum(1)
        result.width, result.largest = self.width * together, self.largest
        return result


class AbsmaxObserver:
    """Clips nothing."""

    def __init__(self) -> None:
        self._largest = 0.0

    def add(self, x: Tensor) -> None:
        """Looks at some values."""
        check_finite(x)
        if x.numel():
            self._largest = max(self._largest, float(x.abs().max()))

    def scale(self) -> float:
        """That of the largest magnitude."""
        return scale_of(self._largest)


class PercentileObserver:
    """Clips the few largest values.

    Args:
        percent: How many of 100 values that are not zero are not clipped.
    """

    def __init__(self, percent: float = 99.99) -> None:
        self._percent = percent
        self._histogram = Histogram()

    def add(self, x: Tensor) -> None:
        """Looks at some values."""
        self._histogram.add(x)

    def scale(self) -> float:
        """That of the first edge of a bin below which so many values lie."""
        seen = self._histogram
        below = np.cumsum(seen.counts)
        edge = (int(np.searchsorted(below, self._percent / 100 * below[-1])) + 1) * seen.width
        return scale_of(min(edge, seen.largest))


class MSEObserver:
    """Clips where the squared error is least, every value standing for the middle of its bin.

    Tried are thresholds from the largest magnitude down to a 64th of it, a 32nd of an octave apart.
    """

    FINENESS = 32
    OCTAVES = 6

    def __init__(self) -> None:
        self._histogram = Histogram()

    def add(self, x: Tensor) -> None:
        """Looks at some values."""
        self._histogram.add(x)

    def scale(self) -> float:
        """That of the best threshold."""
        seen = self._histogram
        counts = seen.counts[: seen.used]
        middles = (np.arange(len(counts)) + 0.5) * seen.width
        filled = counts > 0
        counts, middles = counts[filled], middles[filled]
        if not len(counts):
            return 1.0

        def error(threshold: float) -> float:
            step = threshold / HIGHEST_CODE
            rounded = np.minimum(np.rint(middles / step), HIGHEST_CODE) * step
            return float((counts * (middles - rounded) ** 2).sum())

        steps = range(self.FINENESS * self.OCTAVES + 1)
        return scale_of(min((seen.largest * 2 ** (-i / self.FINENESS) for i in steps), key=error))


class EntropyObserver:
    """Clips where the rounded distribution is most like the real one, as Kullback and Leibler measure it.

    After "8-bit Inference with TensorRT" (S. Migacz, GTC 2017): the first i of 2048 bins stand for a
    threshold; P is the real distribution with what lies beyond added to the last bin that holds anything, and
    Q what 128 levels leave of the bins within. The threshold with the least KL(P ‖ Q) is taken; each that is
    tried is a 32nd narrower than the one before.
    """

    BINS = 2048
    LEVELS = 128
    FINENESS = 32

    def __init__(self) -> None:
        self._histogram = Histogram()

    def add(self, x: Tensor) -> None:
        """Looks at some values."""
        self._histogram.add(x)

    def scale(self) -> float:
        """That of the best threshold."""
        seen = self._histogram.coarse(self.BINS)
        last = seen.used
        if last <= self.LEVELS:  # Also where there is nothing: no level would hold more than one bin.
            return scale_of(seen.largest)
        tried = [last]
        while tried[-1] > self.LEVELS:
            tried.append(max(self.LEVELS, min(tried[-1] - 1, round(tried[-1] * (1 - 1 / self.FINENESS)))))
        bins = min(tried, key=lambda within: self._divergence(seen.counts, within))
        return scale_of(min(bins * seen.width, seen.largest))

    def _divergence(self, counts: Counts, within: int) -> float:
        """KL(P ‖ Q) of the threshold after `within` bins."""
        inside = counts[:within].astype(np.float64)
        beyond = int(counts[within:].sum())
        level = np.arange(within) * self.LEVELS // within
        filled = np.bincount(level, inside > 0, self.LEVELS)
        total = np.bincount(level, inside, self.LEVELS)
        spread = np.where(inside > 0, (total / np.maximum(filled, 1))[level], 0.0)
        some = np.flatnonzero(inside)
        if not len(some):
            return math.inf
        real = inside.copy()
        real[some[-1]] += beyond  # Where Q has something too: it can be empty at the threshold itself.
        p, q = real[some] / real.sum(), spread[some] / spread.sum()
        return float((p * np.log(p / q)).sum())
