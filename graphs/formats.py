"""The formats of weights and products, by name; without torch, so that a request is read quickly."""

from dataclasses import dataclass
from typing import Literal

Form = Literal["float", "w8a8-token", "w8a8-tensor", "w8", "w4"]
"""How a product x · Wᵀ is computed.

| form | W | x |
|---|---|---|
| `float` | 16-bit numbers | as it is |
| `w8a8-token` | 8 bits, a scale per row | rounded to 8 bits at run time, a scale per token |
| `w8a8-tensor` | 8 bits, a scale per row | rounded to 8 bits with one scale, known from calibration |
| `w8` | 8 bits, a scale per row or per block | as it is |
| `w4` | 4 bits, a scale per block | as it is |
"""

TURING = 75
"""The compute capability whose kernels read codes of 8 bits only beside computed numbers, and none of 4."""

TABLE = "embed_tokens"
"""The embedding table's name: it is looked up, and is the head's weight too."""

BLOCK_SIZES = (16, 32, 64, 128, 256)
"""Columns that may share a scale in onnxruntime's MatMulNBits."""

Rounding = Literal["nearest", "mse"]
"""How a group's scale is chosen: so that nothing is clipped, or by the least squared error."""


@dataclass(frozen=True)
class WeightFormat:
    """A format of weights.

    Attributes:
        bits: 4 or 8.
        block: Columns that share a scale; None for one scale per row.
        negative_scales: Whether a scale may be negative, which puts the end of the range that has one code
            more (-8, -128) on the side of the largest weight. TensorRT takes positive scales only.
    """

    bits: Literal[4, 8]
    block: int | None = None
    negative_scales: bool = False

    @property
    def short_scales(self) -> bool:
        """Whether scales have 8 binary digits, those of bfloat16, and so can be stored in 16 bits.

        Those of blocks do: with 24 digits they would be more than a hundredth of 8-bit codes.
        """
        return self.block is not None

    @property
    def lowest(self) -> int:
        """The lowest code."""
        return -(1 << (self.bits - 1))

    @property
    def highest(self) -> int:
        """The highest code."""
        return (1 << (self.bits - 1)) - 1

    def product_block(self, columns: int) -> int | None:
        """Columns of a row that MatMulNBits takes together, weight and input: those that share a scale.

        It knows no scale of a whole row, so a row that has one is cut into the largest blocks that divide it,
        each with that scale. None where it can have neither.
        """
        fitting = [size for size in BLOCK_SIZES if columns % size == 0 and self.block in (None, size)]
        return max(fitting, default=None)

    def groups(self, columns: int) -> int:
        """Scales of a row of `columns`.

        Raises:
            ValueError: The blocks do not divide the row.
        """
        if self.block is None:
            return 1
        if columns % self.block:
            raise ValueError(f"blocks of {self.block} do not divide rows of {columns}")
        return columns // self.block
