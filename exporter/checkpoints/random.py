"""Weights that are made up on the spot: the same for a seed, however they are read, and never stored.

Every block of rows has a generator of its own, seeded by the seed, the tensor's name and the block's number,
so a block can be made without those before it. Values are uniform, not normal: what matters is their spread,
and uniform ones are several times faster to make.
"""

import math
import zlib
from dataclasses import dataclass

import numpy as np
import torch

from gemma_export.exporter.checkpoints.tensor import check_rows
from gemma_export.exporter.config import GemmaConfig

# Enough that seeding costs nothing, few enough that a block stays in a core's cache.
_BLOCK_VALUES = 2**18
# A uniform int16 has this standard deviation: 2^16 / sqrt(12).
_INT16_STD = 2**16 / math.sqrt(12)
# The root mean square of what the first layer is given: a row of the table times sqrt(hidden_size).
_TABLE_RMS = 1 / 32


@dataclass(frozen=True)
class RandomTensor:
    """A tensor of uniform random values.

    Args:
        name: Its name; part of what fixes its values.
        shape: Its shape.
        dtype: float32, float16 or bfloat16; the values are made in float32 and rounded to it.
        seed: The checkpoint's seed.
        mean: The mean of the values.
        std: Their standard deviation.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    seed: int
    mean: float
    std: float

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop); the same values whatever the split."""
        check_rows(self, start, stop)
        result = torch.empty((stop - start, *self.shape[1:]), dtype=self.dtype)
        if result.numel() == 0:
            return result
        rows = max(1, _BLOCK_VALUES // math.prod(self.shape[1:]))
        scratch = torch.empty((rows, *self.shape[1:]))
        for index in range(start // rows, -(-stop // rows)):
            first = index * rows
            low, high = max(start, first), min(stop, first + rows)
            torch.mul(self._integers(index, rows), self.std / _INT16_STD, out=scratch).add_(self.mean)
            result[low - start : high - start] = scratch[low - first : high - first]
        return result

    def _integers(self, index: int, rows: int) -> torch.Tensor:
        """A whole block of rows, as uniform int16."""
        count = rows * math.prod(self.shape[1:])
        key = np.random.SeedSequence([self.seed, zlib.crc32(self.name.encode()), index])
        words = np.random.SFC64(key).random_raw(-(-count // 4))  # each holds four int16
        return torch.from_numpy(words.view(np.int16)[:count]).view(rows, *self.shape[1:])


def random_tensors(config: GemmaConfig, seed: int, dtype: torch.dtype) -> dict[str, RandomTensor]:
    """A tensor for every weight of a model, under Hugging Face's names.

    Projections keep the spread of what they are given (std = fan_in^-0.5). Were the table as wide,
    the residual stream would stay the last token's own row, and every continuation would repeat it; so the
    rows are short, and the last norm makes up for it: logits have a standard deviation of about 2.
    """
    tensors = {}
    for canonical, shape in config.weight_shapes.items():
        mean, std = 0.0, shape[-1] ** -0.5
        if canonical == "embed_tokens.weight":
            std *= _TABLE_RMS
        elif canonical == "norm.weight":
            mean, std = 2.0 / _TABLE_RMS - 1.0, 0.1
        elif len(shape) == 1:
            std = 0.1
        name = f"model.{canonical}"
        tensors[name] = RandomTensor(name, shape, dtype, seed, mean, std)
    return tensors
