"""What is kept of a linear layer's input while text passes through it, in memory that the text does not grow.

Symbols in shape comments: T tokens of one call, n rows of the sample, K channels.
"""

import torch
from torch import Tensor

from gemma_export.calibration.observers import ChannelAbsmax
from gemma_export.errors import CalibrationError

SAMPLE_TOKENS = 512
SAMPLE_VALUES = 2**22
"""Of an input, what is kept: so many tokens, or fewer where they have many channels (17 MB)."""
HESSIAN_COLUMNS = 4096
"""The most channels whose products with each other are summed: 67 MB for each block of so many."""
STRIP = 1024
"""Rows of such a block that are summed at once, from the diagonal on: the rest is the same, mirrored."""
# The fractional parts of its multiples are spread more evenly than those of any other number, whatever
# stretch of them is looked at.
_GOLDEN_RATIO = (5**0.5 - 1) / 2


def column_blocks(columns: int) -> list[slice]:
    """Consecutive blocks of at most `HESSIAN_COLUMNS` channels."""
    return [
        slice(start, min(start + HESSIAN_COLUMNS, columns)) for start in range(0, columns, HESSIAN_COLUMNS)
    ]


class InputStatistics:
    """Statistics of the input x of one linear layer.

    Kept are some of the tokens, evenly spread. A fixed step would show the same few positions of every
    sequence if it divided their length (each first token, which is unlike the others), so a token's turn
    comes by the golden ratio.

    Args:
        channels: K.
        tokens: How many tokens there will be in all.
        hessian: Whether to sum up XᵀX.

    Attributes:
        seen: Tokens so far.
    """

    def __init__(self, channels: int, tokens: int, *, hessian: bool = False) -> None:
        self.channels = channels
        self.seen = 0
        self._most = max(1, min(SAMPLE_TOKENS, SAMPLE_VALUES // channels))
        self._share = min(1.0, self._most / max(1, tokens))
        self._largest = ChannelAbsmax(channels)
        self._sum = torch.zeros(channels, dtype=torch.float64)
        self._kept: list[Tensor] = []
        self._hessian: list[Tensor] | None = None
        if hessian:
            self._hessian = [torch.zeros(b.stop - b.start, b.stop - b.start) for b in column_blocks(channels)]

    def add(self, x: Tensor) -> None:
        """Takes the next tokens.

        Args:
            x: fp32 [..., K]; it is not kept.

        Raises:
            CalibrationError: A value is NaN or infinite.
        """
        x = x.reshape(-1, self.channels)
        self._largest.add(x)
        self._sum += x.abs().sum(0)
        turns = torch.arange(self.seen, self.seen + len(x), dtype=torch.float64) * _GOLDEN_RATIO % 1
        self._kept.append(x[turns < self._share].clone())
        self.seen += len(x)
        if self._hessian is not None:
            for block, hessian in zip(column_blocks(self.channels), self._hessian, strict=True):
                _add_upper(hessian, x[:, block])

    @property
    def absmax(self) -> Tensor:
        """The largest magnitude of each channel over all tokens: fp32 [K]."""
        return self._largest.largest

    @property
    def mean_magnitude(self) -> Tensor:
        """The mean magnitude of each channel over all tokens: fp32 [K]."""
        return (self._sum / max(1, self.seen)).float()

    @property
    def sample(self) -> Tensor:
        """The tokens that were kept: fp32 [n, K], at most `SAMPLE_TOKENS` of them.

        Raises:
            CalibrationError: There were no tokens.
        """
        rows = torch.cat(self._kept)[: self._most] if self._kept else torch.empty(0, self.channels)
        if not len(rows):
            raise CalibrationError(
                "There was no text to calibrate on.", "Give a text of at least a few sentences."
            )
        self._kept = [rows]
        return rows

    @property
    def hessian(self) -> list[Tensor]:
        """XᵀX of each of `column_blocks`, over all tokens: fp32 [k, k].

        Raises:
            ValueError: It was not asked for.
        """
        if self._hessian is None:
            raise ValueError("these statistics have no Hessian")
        for hessian in self._hessian:
            _mirror(hessian)
        return self._hessian


def _add_upper(hessian: Tensor, x: Tensor) -> None:
    """Adds XᵀX to a matrix [k, k], of x [T, k]: to its strips from the diagonal on."""
    for start in range(0, len(hessian), STRIP):
        strip = slice(start, start + STRIP)
        hessian[strip, start:].addmm_(x[:, strip].T, x[:, start:])


def _mirror(hessian: Tensor) -> None:
    """Copies what is beside the strips' diagonal blocks to below these."""
    for start in range(0, len(hessian), STRIP):
        strip, rest = slice(start, start + STRIP), slice(start + STRIP, None)
        hessian[rest, strip] = hessian[strip, rest].T
