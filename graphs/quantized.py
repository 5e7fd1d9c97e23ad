"""Weights that are quantized while they are read, in the layouts that operators take.

A weight has two parts, codes and scales, which are two tensors in the file. Both are sources of rows like any
other, so that a quantized model is written block by block too. Both come of one reading of the weight: the
scales of rows whose codes were asked for are kept until they have been asked for as well.

Symbols in shape comments: R rows of a block that is read, N rows in all, K columns, G groups of b columns.
"""

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from gemma_export.errors import GraphError
from gemma_export.graphs.formats import Rounding, WeightFormat
from gemma_export.graphs.quantization import LinearQuantization, encode, pack_nibbles, scales_for
from gemma_export.graphs.tensors import RowSource, not_finite

SLICE_VALUES = 2**18
"""Numbers that are rounded at a time: what is made of them on the way stays in a core's cache."""

WORKERS = min(4, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
"""Threads that round slices of a block. torch does not hold Python's lock while it computes."""

Part = Literal["codes", "scales"]


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight [N, K] as codes and scales.

    Attributes:
        format: Of the codes.
        codes: int8 [N, K], whatever their width.
        scales: fp32 [N, G]; those of blocks have the digits of bfloat16.
    """

    format: WeightFormat
    codes: RowSource
    scales: RowSource


def quantized(source: RowSource, how: LinearQuantization) -> QuantizedWeight:
    """A weight [N, K] in the format that was chosen for it, computed as it is read unless codes are stored.

    Reading either part raises CheckpointError where the weight holds NaN or infinity.

    Raises:
        GraphError: The blocks do not divide the weight's rows, or what is stored has another shape.
        ValueError: No format was chosen: the weight stays a 16-bit number.
    """
    if how.format is None:
        raise ValueError(f"{source.name} is not quantized")
    rows, columns = source.shape
    try:
        groups = how.format.groups(columns)
    except ValueError as error:
        raise GraphError(
            f"{source.name} cannot be quantized: {error}.", "Choose another --block, one that divides them."
        ) from error
    if how.stored is None:
        rounded = _Rounding(source, how.format, how.rounding)
        return QuantizedWeight(how.format, _Part(rounded, "codes"), _Part(rounded, "scales"))
    codes, scales = how.stored
    if (codes.shape, codes.dtype, scales.shape) != ((rows, columns), torch.int8, (rows, groups)):
        raise GraphError(
            f"The stored codes of {source.name} are {codes.dtype} {list(codes.shape)} with scales "
            f"{list(scales.shape)}, and the weight needs int8 {[rows, columns]} with {[rows, groups]}.",
            "They belong to another model or another block size: calibrate again.",
        )
    return QuantizedWeight(how.format, codes, scales)


@dataclass(frozen=True)
class _Memory:
    """Scales that were computed: fp32 [N, G], and which rows of them are there: bool [N]."""

    scales: Tensor
    known: Tensor


class _Rounding:
    """What codes and scales of one weight share: its source, and the scales that are known already."""

    def __init__(self, source: RowSource, form: WeightFormat, rounding: Rounding) -> None:
        self.source, self.form, self.rounding = source, form, rounding
        self.groups = form.groups(source.shape[1])
        self._slice = max(1, SLICE_VALUES // source.shape[1])
        self._lock = threading.Lock()
        self._memory: _Memory | None = None
        self._rows_read: dict[Part, int] = {"codes": 0, "scales": 0}

    def codes(self, start: int, stop: int) -> Tensor:
        """Codes int8 [R, K] of rows [start, stop)."""
        codes = torch.empty((stop - start, self.source.shape[1]), dtype=torch.int8)
        memory = self._remember()

        def fill(low: int, high: int) -> None:
            rows = self.source.read(low, high)
            codes[low - start : high - start] = encode(
                rows, self._scales_of(rows, low, high, memory), self.form
            )

        in_slices(fill, start, stop, self._slice)
        self._forget("codes", stop - start)
        return codes

    def scales(self, start: int, stop: int) -> Tensor:
        """Scales fp32 [R, G] of rows [start, stop)."""
        memory = self._remember()

        def fill(low: int, high: int) -> None:
            if not memory.known[low:high].all():
                self._scales_of(self.source.read(low, high), low, high, memory)

        in_slices(fill, start, stop, self._slice)
        self._forget("scales", stop - start)
        return memory.scales[start:stop].clone()

    def _scales_of(self, rows: Tensor, low: int, high: int, memory: _Memory) -> Tensor:
        """Scales [R, G] of rows [low, high) that were read."""
        if not memory.known[low:high].all():
            scales = scales_for(rows, self.form, self.rounding)
            # The largest value of each group is in its scale, so NaN and infinity are seen here.
            if not scales.isfinite().all():
                raise not_finite(self.source)
            memory.scales[low:high] = scales
            memory.known[low:high] = True
        return memory.scales[low:high]

    def _remember(self) -> _Memory:
        with self._lock:
            if self._memory is None:
                rows = self.source.shape[0]
                self._memory = _Memory(torch.empty(rows, self.groups), torch.zeros(rows, dtype=torch.bool))
            return self._memory

    def _forget(self, part: Part, rows: int) -> None:
        """Lets go of the scales once both parts have been read: they would add up over a model."""
        with self._lock:
            self._rows_read[part] += rows
            if min(self._rows_read.values()) >= self.source.shape[0]:
                self._memory = None
                self._rows_read = {"codes": 0, "scales": 0}


@dataclass(frozen=True)
class _Part:
    """Codes int8 [N, K] or scales fp32 [N, G] of a weight."""

    rounding: _Rounding
    part: Part

    @property
    def name(self) -> str:
        return self.rounding.source.name

    @property
    def shape(self) -> tuple[int, ...]:
        rows, columns = self.rounding.source.shape
        return (rows, columns if self.part == "codes" else self.rounding.groups)

    @property
    def dtype(self) -> torch.dtype:
        return torch.int8 if self.part == "codes" else torch.float32

    def read(self, start: int, stop: int) -> Tensor:
        if self.part == "codes":
            return self.rounding.codes(start, stop)
        return self.rounding.scales(start, stop)


@dataclass(frozen=True)
class PackedBlocks:
    """Codes as MatMulNBits reads them: uint8 [N, G, b · bits / 8], zero at 128 or, in half a byte, 8."""

    weight: QuantizedWeight
    dtype: torch.dtype = torch.uint8

    @property
    def name(self) -> str:
        """The weight's name."""
        return self.weight.codes.name

    @property
    def shape(self) -> tuple[int, ...]:
        """N, G, b · bits / 8."""
        rows, columns = self.weight.codes.shape
        block = self.weight.format.product_block(columns)
        assert block is not None
        return (rows, columns // block, block * self.weight.format.bits // 8)

    def read(self, start: int, stop: int) -> Tensor:
        """Rows [start, stop)."""
        codes = self.weight.codes.read(start, stop)
        # Adding the zero point is flipping the sign bit: no code carries into another.
        if self.weight.format.bits == 8:
            packed = codes.view(torch.uint8).bitwise_xor_(0x80)
        else:
            packed = pack_nibbles(codes).bitwise_xor_(0x88)
        return packed.reshape(stop - start, *self.shape[1:])


@dataclass(frozen=True)
class PackedRows:
    """Codes of 4 bits as ONNX stores INT4: uint8 [N, K / 2], for a StreamedTensor of that format."""

    weight: QuantizedWeight
    dtype: torch.dtype = torch.uint8

    @property
    def name(self) -> str:
        """The weight's name."""
        return self.weight.codes.name

    @property
    def shape(self) -> tuple[int, ...]:
        """N, K / 2."""
        rows, columns = self.weight.codes.shape
        return (rows, columns // 2)

    def read(self, start: int, stop: int) -> Tensor:
        """Rows [start, stop)."""
        return pack_nibbles(self.weight.codes.read(start, stop))


class TransposedCodes:
    """Codes as MatMulInteger reads them: int8 [K, N].

    A row of these is a column of the weight, so the whole weight is quantized when the first is asked for and
    held, in 8 bits, until the last has been: the memory is that of the largest weight.
    """

    dtype = torch.int8

    def __init__(self, weight: QuantizedWeight) -> None:
        self._codes = weight.codes
        self._held: Tensor | None = None

    @property
    def name(self) -> str:
        """The weight's name."""
        return self._codes.name

    @property
    def shape(self) -> tuple[int, ...]:
        """K, N."""
        rows, columns = self._codes.shape
        return (columns, rows)

    def read(self, start: int, stop: int) -> Tensor:
        """Rows [start, stop)."""
        if self._held is None:
            self._held = self._transpose()
        rows = self._held[start:stop].clone()
        if stop == self.shape[0]:
            self._held = None
        return rows

    def _transpose(self) -> Tensor:
        held = torch.empty(self.shape, dtype=torch.int8)

        def fill(low: int, high: int) -> None:
            held[:, low:high] = self._codes.read(low, high).T

        in_slices(fill, 0, self.shape[1], max(1, SLICE_VALUES // self.shape[0]))
        return held


@dataclass(frozen=True)
class GroupScales:
    """The scales of a weight, in the format that holds all of their digits: [N, G].

    That is bfloat16 for those of blocks, and fp32 for one per row.
    """

    weight: QuantizedWeight

    @property
    def name(self) -> str:
        """The weight's name."""
        return self.weight.scales.name

    @property
    def shape(self) -> tuple[int, ...]:
        """N, G."""
        return self.weight.scales.shape

    @property
    def dtype(self) -> torch.dtype:
        """bfloat16 or float32."""
        return torch.bfloat16 if self.weight.format.short_scales else torch.float32

    def read(self, start: int, stop: int) -> Tensor:
        """Rows [start, stop).

        Raises:
            GraphError: They come from a file, and have digits that would be lost.
        """
        scales = self.weight.scales.read(start, stop)
        short = scales.to(self.dtype)
        if not torch.equal(short.float(), scales):
            raise GraphError(
                f"The stored scales of {self.name} have more digits than 16 bits hold.",
                "They were made by another release: calibrate again.",
            )
        return short


@dataclass(frozen=True)
class RowScales:
    """The scales of a weight that has one per row: fp32 [N]."""

    weight: QuantizedWeight
    dtype: torch.dtype = torch.float32

    @property
    def name(self) -> str:
        """The weight's name."""
        return self.weight.scales.name

    @property
    def shape(self) -> tuple[int, ...]:
        """N."""
        return self.weight.scales.shape[:1]

    def read(self, start: int, stop: int) -> Tensor:
        """Rows [start, stop)."""
        return self.weight.scales.read(start, stop)[:, 0]


def in_slices(work: Callable[[int, int], None], start: int, stop: int, step: int) -> None:
    """Calls `work(low, high)` for consecutive slices of [start, stop), several at a time.

    The threads are new each time: torch's number of threads is then the caller's, which for the thread that
    reads weights is one.
    """
    lows = range(start, stop, step)
    if len(lows) <= 1 or WORKERS == 1:
        for low in lows:
            work(low, min(low + step, stop))
        return
    with ThreadPoolExecutor(min(WORKERS, len(lows)), "quantize") as workers:
        for done in [workers.submit(work, low, min(low + step, stop)) for low in lows]:
            done.result()
