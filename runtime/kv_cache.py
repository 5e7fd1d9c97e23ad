"""The key-value cache: allocated once, written in place, never past its end.

Symbols in shape comments: B rows, K key-value heads, S slots, h head_dim, T new tokens.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from gemma_export.errors import ContextFullError

Array = npt.NDArray[Any]

STORAGE: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    # numpy has no bfloat16: its 16 bits are kept as they are.
    "bfloat16": np.dtype(np.uint16),
    "int8": np.dtype(np.int8),
}
"""The numpy dtype that holds each dtype a cache may have."""

_ALIGNMENT = 64  # bytes: a cache line, and the widest vector load


class LayerScales(Protocol):
    """What the codes of one layer's int8 cache stand for: code · scale, with a positive scale per KV head."""

    @property
    def key(self) -> Sequence[float]:
        """Of the keys, K numbers."""
        ...

    @property
    def value(self) -> Sequence[float]:
        """Of the values, K numbers."""
        ...


class CacheBuffer(Protocol):
    """Keys or values of a layer, [B, K, S, h]: a numpy array, or memory of a device that slices like one."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The four sizes."""
        ...

    def __getitem__(self, rows: slice, /) -> "CacheBuffer":
        """Rows of it over the same memory."""
        ...

    def __array__(self) -> Array:
        """What is in it, on the host: its own memory or a copy of it."""
        ...


class KVCache:
    """Keys and values of every layer for B rows of S slots, and how many slots of each row are filled.

    Slot = position: the token at position p of a row has its keys and values in slot p. What lies behind a
    row's length is scratch that nothing reads, so a step that is interrupted before `advance` leaves the
    cache as it was.

    Args:
        key_buffers: One [B, K, S, h] C-contiguous buffer per layer, of the storage dtype; not copied.
        value_buffers: Likewise.
        dtype: The dtype of the elements: float32, float16, bfloat16 or int8.
        lengths: int64 [B], not copied: the filled slots of each row.
        scales: Of an int8 cache, one per layer; of any other, none.

    Raises:
        ValueError: An int8 cache has not the scales of every layer and head, or another cache has some.
    """

    def __init__(
        self,
        key_buffers: Sequence[CacheBuffer],
        value_buffers: Sequence[CacheBuffer],
        dtype: str,
        lengths: npt.NDArray[np.int64],
        scales: Sequence[LayerScales] = (),
    ) -> None:
        # What they are, only the backend that made them knows.
        self.key_buffers: tuple[Any, ...] = tuple(key_buffers)
        self.value_buffers: tuple[Any, ...] = tuple(value_buffers)
        self.dtype = dtype
        self.lengths = lengths
        self.batch: int = self.key_buffers[0].shape[0]
        self.max_length: int = self.key_buffers[0].shape[2]
        self.scales = tuple(scales)
        heads: int = self.key_buffers[0].shape[1]
        wanted = [(heads, heads)] * (len(self.key_buffers) if dtype == "int8" else 0)
        if [(len(layer.key), len(layer.value)) for layer in self.scales] != wanted:
            shape = f"{len(self.key_buffers)} layers of {heads} heads in {dtype}"
            raise ValueError(f"the scales do not fit {shape}: {self.scales}")

    @classmethod
    def allocate(
        cls,
        *,
        layers: int,
        batch: int,
        kv_heads: int,
        max_length: int,
        head_dim: int,
        dtype: str,
        scales: Sequence[LayerScales] = (),
    ) -> "KVCache":
        """An empty cache of `2 * layers * batch * kv_heads * max_length * head_dim` elements.

        The memory comes from the system as zeros and is not touched here.

        Raises:
            ValueError: `dtype` and `scales` do not fit, as in the constructor.
        """
        shape = (batch, kv_heads, max_length, head_dim)
        keys = [_aligned_zeros(shape, STORAGE[dtype]) for _ in range(layers)]
        values = [_aligned_zeros(shape, STORAGE[dtype]) for _ in range(layers)]
        return cls(keys, values, dtype, np.zeros(batch, np.int64), scales)

    @property
    def length(self) -> int:
        """Filled slots, where all rows have the same number.

        Raises:
            ValueError: The rows differ; read `lengths`.
        """
        first = int(self.lengths[0])
        if (self.lengths != first).any():
            raise ValueError(f"the rows have different lengths: {self.lengths.tolist()}")
        return first

    def row(self, index: int) -> "KVCache":
        """Row `index` as a cache of one row over the same memory and the same length.

        A row is contiguous in every buffer, so a graph can be bound to it: a ragged batch is prefilled row
        by row, without padding.
        """
        rows = slice(index, index + 1)
        return KVCache(
            [buffer[rows] for buffer in self.key_buffers],
            [buffer[rows] for buffer in self.value_buffers],
            self.dtype,
            self.lengths[rows],
            self.scales,
        )

    def require(self, new_tokens: int) -> None:
        """Checks that every row has room for `new_tokens` more.

        Raises:
            ContextFullError: One has not; nothing was written.
        """
        check_room(self.max_length, int(self.lengths.max()), new_tokens)

    def advance(self, new_tokens: int | npt.NDArray[np.int64]) -> None:
        """Counts slots that have been written: the same number in every row, or int64 [B]."""
        self.lengths += new_tokens

    def truncate(self, length: int) -> None:
        """Forgets what lies behind the first `length` tokens of every row."""
        np.minimum(self.lengths, length, out=self.lengths)

    def keys(self, layer: int) -> Array:
        """The filled keys of a layer: [B, K, length, h].

        float32 and float16 are views of a cache in the host's memory; bfloat16, which numpy lacks, and int8
        are float32 copies. Of a cache on a device all are copies.
        """
        return self._filled(self.key_buffers[layer], self.scales[layer].key if self.scales else ())

    def values(self, layer: int) -> Array:
        """The filled values of a layer, as `keys`."""
        return self._filled(self.value_buffers[layer], self.scales[layer].value if self.scales else ())

    def _filled(self, buffer: CacheBuffer, scales: Sequence[float]) -> Array:
        filled: Array = np.asarray(buffer)[:, :, : self.length]
        if self.dtype == "bfloat16":
            return (filled.astype(np.uint32) << 16).view(np.float32)
        if self.dtype == "int8":
            return filled.astype(np.float32) * np.array(scales, np.float32)[:, None, None]
        return filled


def check_room(max_length: int, held: int, new_tokens: int) -> None:
    """Checks that `new_tokens` fit into a row of `max_length` slots of which `held` are filled.

    Raises:
        ContextFullError: They do not.
    """
    if held + new_tokens > max_length:
        what = f"{held} tokens and {new_tokens} new ones" if held else f"{new_tokens} tokens"
        raise ContextFullError(
            f"{what} do not fit into the bundle's context of {max_length}.",
            "Shorten the text, start a new conversation, or build the bundle with a larger --max-length.",
        )


def _aligned_zeros(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    size = int(np.prod(shape)) * dtype.itemsize
    raw = np.zeros(size + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)
