"""Initializers that are read in blocks of rows, and what may be done to them on the way to the disk.

A weight stays where the checkpoint has it until the graph is written. What a pass does to a weight (add one,
concatenate, change the number format) is a small object around the weight that does it to each block as it
passes through, so the memory of a build is a few blocks, whatever the model.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import onnx_ir as ir
import torch

from gemma_export.errors import CheckpointError

BLOCK_BYTES = 2 << 20
"""Size of a block as it is written. Every block is touched four times (made, checked, hashed, written), so
what counts is that it stays in a core's cache and that the allocator hands out the same memory again: with
4 MiB the writing takes twice as long."""

IR_DTYPES = {
    torch.float32: ir.DataType.FLOAT,
    torch.float16: ir.DataType.FLOAT16,
    torch.bfloat16: ir.DataType.BFLOAT16,
    torch.int8: ir.DataType.INT8,
    torch.uint8: ir.DataType.UINT8,
}
TORCH_DTYPES = {ir_dtype: dtype for dtype, ir_dtype in IR_DTYPES.items()}


class RowSource(Protocol):
    """A tensor whose rows (slices of axis 0) can be read on demand."""

    @property
    def name(self) -> str:
        """Where the values come from, for messages."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of all axes; the tensor has at least one."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """float32, float16 or bfloat16; int8 or uint8 of codes."""
        ...

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) as an owned CPU tensor of `dtype`."""
        ...


@dataclass(frozen=True)
class InMemory:
    """A small tensor that is simply there: a constant."""

    name: str
    tensor: torch.Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of all axes."""
        return tuple(self.tensor.shape)

    @property
    def dtype(self) -> torch.dtype:
        """The tensor's own."""
        return self.tensor.dtype

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop)."""
        return self.tensor[start:stop].clone()


@dataclass(frozen=True)
class RotaryTable:
    """Cosines or sines of every position's angles, fp32 [slots, h / 2].

    Attributes:
        name: What to call it.
        frequencies: fp32 [h / 2]; an angle is position · frequency, rounded to fp32.
        slots: Positions.
        function: `torch.cos` or `torch.sin`.
    """

    name: str
    frequencies: torch.Tensor
    slots: int
    function: Callable[[torch.Tensor], torch.Tensor]

    @property
    def shape(self) -> tuple[int, ...]:
        """A row for each position, a column for each frequency."""
        return (self.slots, len(self.frequencies))

    @property
    def dtype(self) -> torch.dtype:
        """fp32, whatever the graph computes in."""
        return torch.float32

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop)."""
        positions = torch.arange(start, stop, dtype=torch.float32)
        return self.function(positions[:, None] * self.frequencies[None, :])


@dataclass(frozen=True)
class OfSource:
    """Rows made one by one of another source's: the same name, the same shape.

    Attributes:
        source: What they are made of.
    """

    source: RowSource

    @property
    def name(self) -> str:
        """The source's name."""
        return self.source.name

    @property
    def shape(self) -> tuple[int, ...]:
        """The source's shape."""
        return self.source.shape


@dataclass(frozen=True)
class Cast(OfSource):
    """The source in another floating-point format, rounded to nearest even."""

    dtype: torch.dtype

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop), cast."""
        # By way of fp32, which holds every value of both: the direct cast between 16-bit formats is a third
        # as fast.
        return self.source.read(start, stop).float().to(self.dtype)


@dataclass(frozen=True)
class OnePlus(OfSource):
    """1 + source, added in fp32: the gain of a Gemma RMSNorm as a standard operator takes it.

    Near 1 bfloat16 has steps of 2^-7, so the sum must not be rounded back to the checkpoint's format.
    """

    dtype: torch.dtype = torch.float32

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) plus one, fp32."""
        return self.source.read(start, stop).float() + 1.0


@dataclass(frozen=True)
class ConcatRows:
    """Several sources of one format and equal row shape, one below the other."""

    sources: tuple[RowSource, ...]

    @property
    def name(self) -> str:
        """The sources' names."""
        return " + ".join(source.name for source in self.sources)

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows add up; the other axes are the sources'."""
        return (sum(source.shape[0] for source in self.sources), *self.sources[0].shape[1:])

    @property
    def dtype(self) -> torch.dtype:
        """The sources' common format."""
        return self.sources[0].dtype

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop), from as many of the sources as they cross."""
        parts, offset = [], 0
        for source in self.sources:
            low, high = max(start - offset, 0), min(stop - offset, source.shape[0])
            if low < high:
                parts.append(source.read(low, high))
            offset += source.shape[0]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


@dataclass(frozen=True)
class ScaleRows(OfSource):
    """Each row of a source times a number of its own, in fp32.

    Attributes:
        source: [N] or [N, K].
        factors: fp32 [N].
    """

    factors: torch.Tensor
    dtype: torch.dtype = torch.float32

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop), fp32."""
        rows = self.source.read(start, stop).float()
        return rows * self.factors[start:stop].view(-1, *[1] * (rows.dim() - 1))


@dataclass(frozen=True)
class ScaleColumns(OfSource):
    """Each column of a source times a number of its own, in fp32.

    Attributes:
        source: [N, K].
        factors: fp32 [K].
    """

    factors: torch.Tensor
    dtype: torch.dtype = torch.float32

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop), fp32."""
        return self.source.read(start, stop).float() * self.factors


class StreamedTensor(ir.LazyTensor):
    """An initializer's value that is written block by block and never held whole.

    Asking it for its whole value is possible for small tensors only (a library that evaluates constants may);
    a pass that would read a whole weight is stopped.

    Args:
        source: Its rows.
        name: Of the initializer; None takes the source's.
        dtype: INT4 where the source's bytes (uint8 [.., K / 2]) hold two numbers each, the first in the low
            half: the tensor is then [.., K]. None for the format that the source has.
    """

    WHOLE_LIMIT_BYTES = 64 << 20

    def __init__(self, source: RowSource, name: str | None = None, dtype: ir.DataType | None = None) -> None:
        packed = dtype == ir.DataType.INT4
        shape = (*source.shape[:-1], 2 * source.shape[-1]) if packed else source.shape
        super().__init__(
            self._whole,
            dtype=ir.DataType.INT4 if packed else IR_DTYPES[source.dtype],
            shape=ir.Shape(shape),
            name=name or source.name,
        )
        self.source = source

    def _whole(self) -> ir.TensorProtocol:
        if self.nbytes > self.WHOLE_LIMIT_BYTES:
            raise MemoryError(f"{self.name} ({self.nbytes:,} bytes) may only be read in blocks")
        rows = self.source.read(0, self.source.shape[0]).contiguous()
        if self.dtype == ir.DataType.INT4:
            return ir.PackedTensor(rows.numpy().reshape(-1), self.dtype, shape=self.shape, name=self.name)
        return ir.tensor(rows, name=self.name)

    def blocks(self, block_bytes: int = BLOCK_BYTES) -> Iterator[torch.Tensor]:
        """The value as consecutive blocks of whole rows, each about `block_bytes` or one row."""
        rows = self.source.shape[0]
        step = max(1, block_bytes * rows // max(1, self.nbytes))
        for start in range(0, rows, step):
            yield self.source.read(start, min(start + step, rows))


def not_finite(source: RowSource) -> CheckpointError:
    """What is raised for a weight with NaN or infinity in it."""
    return CheckpointError(
        f"The weight {source.name} holds NaN or infinity.",
        "The checkpoint is damaged or its training diverged: get it again, or look at the training run.",
    )


def streamed(value: ir.Value | None) -> StreamedTensor | None:
    """The streamed tensor behind an initializer, or None for anything else."""
    tensor = None if value is None else value.const_value
    return tensor if isinstance(tensor, StreamedTensor) else None


def add_initializer(
    graph: ir.Graph, name: str, source: RowSource, dtype: ir.DataType | None = None
) -> ir.Value:
    """Registers a streamed initializer and returns its value; `dtype` as `StreamedTensor` has it."""
    tensor = StreamedTensor(source, name=name, dtype=dtype)
    value = ir.Value(
        name=name, shape=ir.Shape(tensor.shape), type=ir.TensorType(tensor.dtype), const_value=tensor
    )
    graph.register_initializer(value)
    return value


def in_format(source: RowSource, dtype: torch.dtype) -> RowSource:
    """The source in a format, without passing through a wider one that was only needed on the way."""
    while isinstance(source, Cast):
        source = source.source
    if isinstance(source, ConcatRows):
        return ConcatRows(tuple(in_format(part, dtype) for part in source.sources))
    return source if source.dtype == dtype else Cast(source, dtype)
