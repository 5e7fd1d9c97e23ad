"""The key-value cache: allocated once, written in place, never past its end.

Symbols in shape comments: B rows, K key-value heads, S slots of a layer, h head_dim, T new tokens.
"""

import mmap
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from gemma_export.errors import ContextFullError, OverwrittenError
from gemma_export.runtime.rolling import RollingCache

Array = npt.NDArray[Any]

STORAGE: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    # numpy has no bfloat16: its 16 bits are kept as they are.
    "bfloat16": np.dtype(np.uint16),
    "int8": np.dtype(np.int8),
}
"""The numpy dtype that holds each dtype a cache may have."""

# Not shared with a process that is forked, as anonymous pages otherwise are.
_PRIVATE = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}


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
    cache as it was. In a layer whose cache rolls, slot = position mod S (`runtime.rolling`): it holds the
    last S positions that were written, and a row can go back as far only as its window is still there.

    Args:
        key_buffers: One [B, K, S, h] C-contiguous buffer per layer, of the storage dtype; not copied.
        value_buffers: Likewise.
        dtype: The dtype of the elements: float32, float16, bfloat16 or int8.
        lengths: int64 [B], not copied: the filled slots of each row.
        scales: Of an int8 cache, one per layer; of any other, none.
        max_length: The most tokens of a row; None takes the slots of the first layer.
        rolling: Which layers' caches roll; None where none does.
        written: int64 [B], not copied: how many positions of each row have been written; None takes
            `lengths`.

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
        *,
        max_length: int | None = None,
        rolling: RollingCache | None = None,
        written: npt.NDArray[np.int64] | None = None,
    ) -> None:
        # What they are, only the backend that made them knows.
        self.key_buffers: tuple[Any, ...] = tuple(key_buffers)
        self.value_buffers: tuple[Any, ...] = tuple(value_buffers)
        self.dtype = dtype
        self.lengths = lengths
        self.batch: int = self.key_buffers[0].shape[0]
        self.max_length: int = max_length or self.key_buffers[0].shape[2]
        self.rolling = rolling
        self._written = lengths.copy() if written is None else written
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
        rolling: RollingCache | None = None,
    ) -> "KVCache":
        """An empty cache of `2 * layers * batch * kv_heads * max_length * head_dim` elements.

        A layer whose cache rolls has `rolling.slots` in the place of `max_length`.

        The memory comes from the system as zeros and is not touched here.

        Raises:
            ValueError: `dtype` and `scales` do not fit, as in the constructor.
        """
        shapes = [(batch, kv_heads, slots, head_dim) for slots in layer_slots(layers, max_length, rolling)]
        keys = [_untouched_zeros(shape, STORAGE[dtype]) for shape in shapes]
        values = [_untouched_zeros(shape, STORAGE[dtype]) for shape in shapes]
        lengths = np.zeros(batch, np.int64)
        return cls(keys, values, dtype, lengths, scales, max_length=max_length, rolling=rolling)

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

    @property
    def written(self) -> int:
        """Positions that have been written: more than are filled where a rolling cache has gone back."""
        filled = int(self.lengths.max())
        return filled if self.rolling is None else max(filled, int(self._written.max()))

    def restore(self, length: int, written: int) -> None:
        """Takes over buffers as they were written elsewhere: `length` of `written` positions count."""
        self.lengths[:], self._written[:] = length, written

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
            max_length=self.max_length,
            rolling=self.rolling,
            written=self._written[rows],
        )

    @property
    def longest_step(self) -> int:
        """The most tokens that can be written and, if the step is interrupted, written again."""
        return self.max_length if self.rolling is None else self.rolling.chunk

    def require(self, new_tokens: int) -> None:
        """Checks that every row has room for `new_tokens` more.

        Raises:
            ContextFullError: One has not; nothing was written.
        """
        check_room(self.max_length, int(self.lengths.max()), new_tokens)

    def advance(self, new_tokens: int | npt.NDArray[np.int64]) -> None:
        """Counts slots that have been written: the same number in every row, or int64 [B]."""
        self.lengths += new_tokens

    def begin(self, position_ids: npt.NDArray[np.int64]) -> list[slice]:
        """Says in which parts a step has to be run, and counts its positions as written.

        Args:
            position_ids: int64 [B, T], consecutive in each row.

        Returns:
            Slices of the T tokens, in order: one of all of them where nothing rolls.

        Raises:
            OverwrittenError: A rolling cache does not hold any more what the first token of a row sees.
        """
        starts, tokens = position_ids[:, 0], position_ids.shape[1]
        if self.rolling is None:
            return [slice(0, tokens)]
        self._check_can_go_on(starts)
        self._written[:] = np.maximum(np.where(starts == 0, 0, self._written), starts + tokens)
        return self.rolling.parts(starts, tokens)

    def reusable(self, length: int) -> int:
        """How many of the first `length` tokens every row can go on from: all of them, or none.

        None where a row has fewer, or where a rolling cache has overwritten what the next token sees.
        """
        starts = np.full(self.batch, length)
        fits = length <= self.lengths.min() and (self.rolling is None or self._can_go_on(starts).all())
        return length if fits else 0

    def truncate(self, length: int) -> None:
        """Forgets what lies behind the first `length` tokens of every row.

        Raises:
            OverwrittenError: A rolling cache does not hold any more what the next token sees; nothing was
                forgotten. `reusable` tells before.
        """
        lengths = np.minimum(self.lengths, length)
        self._check_can_go_on(lengths)
        self.lengths[:] = lengths

    def _can_go_on(self, starts: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        # A step that was interrupted has written, and a row may have been advanced without `begin`.
        assert self.rolling is not None
        return self.rolling.can_go_on(starts, np.maximum(self._written, self.lengths))

    def _check_can_go_on(self, starts: npt.NDArray[np.int64]) -> None:
        if self.rolling is None or (can := self._can_go_on(starts)).all():
            return
        row = int(np.flatnonzero(~can)[0])
        raise OverwrittenError(
            f"A row of {max(self._written[row], self.lengths[row])} tokens cannot go back to its first "
            f"{starts[row]}: local layers keep {self.rolling.slots} positions, and those that the next token "
            "sees are overwritten.",
            "Run the text from its beginning, or build the bundle with --local-cache full.",
        )

    def positions(self, layer: int) -> range:
        """The positions that a layer holds: all that are filled, or the last of them where its cache rolls.

        Raises:
            ValueError: The rows differ; take one with `row`.
        """
        slots: int = self.key_buffers[layer].shape[2]
        first = max(self.length, int(self._written.max())) - slots if self._rolls(layer) else 0
        return range(min(max(0, first), self.length), self.length)

    def _rolls(self, layer: int) -> bool:
        return self.rolling is not None and layer in self.rolling.layers

    def keys(self, layer: int) -> Array:
        """The filled keys of a layer: [B, K, n, h], of its n `positions` in their order.

        float32 and float16 are views of a cache in the host's memory; bfloat16, which numpy lacks, and int8
        are float32 copies. Of a cache on a device, and of one that rolls, all are copies.
        """
        return self._filled(layer, self.key_buffers, self.scales[layer].key if self.scales else ())

    def values(self, layer: int) -> Array:
        """The filled values of a layer, as `keys`."""
        return self._filled(layer, self.value_buffers, self.scales[layer].value if self.scales else ())

    def _filled(self, layer: int, buffers: Sequence[CacheBuffer], scales: Sequence[float]) -> Array:
        stored: Array = np.asarray(buffers[layer])
        filled = stored[:, :, : self.length]
        if self._rolls(layer):
            filled = stored[:, :, np.array(self.positions(layer), np.int64) % stored.shape[2]]
        if self.dtype == "bfloat16":
            return (filled.astype(np.uint32) << 16).view(np.float32)
        if self.dtype == "int8":
            return filled.astype(np.float32) * np.array(scales, np.float32)[:, None, None]
        return filled


def layer_slots(layers: int, max_length: int, rolling: RollingCache | None) -> list[int]:
    """Slots of each layer's cache, where rows have at most `max_length` tokens."""
    rolls = frozenset(() if rolling is None else rolling.layers)
    return [rolling.slots if rolling is not None and i in rolls else max_length for i in range(layers)]


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


def _untouched_zeros(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """Zeros in pages of their own, each of which takes memory when it is first written.

    numpy's may come from memory that an earlier cache left, which is then written with zeros from end to end.

    Raises:
        MemoryError: The system gives no such memory.
    """
    size = int(np.prod(shape)) * dtype.itemsize
    try:
        pages = mmap.mmap(-1, size, **_PRIVATE)
    except OSError as error:
        raise MemoryError(f"a cache needs {size:,} bytes more") from error
    return np.frombuffer(pages, dtype).reshape(shape)
