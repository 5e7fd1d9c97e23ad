"""The reference: the checkpoint itself in fp32, run layer by layer, so that it fits where the model does not.

One layer's parameters are in memory at a time. Every sequence passes through a layer while it is there, so a
run reads each layer once, however many sequences it is given. Of the embedding table only the rows that are
used are read; the head, which is the same table, is computed in blocks of its rows.

Symbols in the shape comments: T tokens, d hidden size, K KV heads, h head_dim, V vocabulary, n positions.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from gemma_export.exporter.checkpoints.checkpoint import LazyTensor
from gemma_export.exporter.config import GemmaConfig
from gemma_export.exporter.decoder import DecoderLayer, RMSNorm, causal_mask, rotary_tables, soft_cap
from gemma_export.exporter.memory import give_back_large_blocks
from gemma_export.exporter.parity.observation import Observe, watch

Array = npt.NDArray[np.float32]
Positions = Sequence[Sequence[int]]

BLOCK_BYTES = 64 << 20
"""Size in fp32 of the blocks of rows in which weights are read."""
QUERY_BLOCK = 512
"""Tokens that attend at once: the scores of a long sequence are the largest activation there is."""
LOGITS_BLOCK = 128
"""Positions whose logits are made at once; 128 rows of 256,000 are 131 MB."""

_log = logging.getLogger(__name__)


def check_sequences(sequences: Sequence[Sequence[int]], vocab_size: int) -> None:
    """Refuses what no model can run.

    Raises:
        ValueError: A sequence is empty or has a token outside the vocabulary.
    """
    for i, sequence in enumerate(sequences):
        if not sequence:
            raise ValueError(f"sequence {i} is empty")
        if min(sequence) < 0 or max(sequence) >= vocab_size:
            raise ValueError(f"sequence {i} has a token outside the vocabulary of {vocab_size}")


def kept_positions(sequences: Sequence[Sequence[int]], keep_cache: bool | Positions) -> list[list[int]]:
    """Positions whose keys and values a run keeps, for each sequence: all, none, or those listed."""
    if isinstance(keep_cache, bool):
        return [list(range(len(sequence))) if keep_cache else [] for sequence in sequences]
    return [list(positions) for positions in keep_cache]


@dataclass(frozen=True)
class ReferenceRun:
    """What the reference says of some sequences. Arrays are fp32 numpy arrays of the caller's own.

    Args:
        lengths: Tokens of each sequence.
        hidden: Each sequence's hidden states after the final norm [T, d]: the head's input.
        head: The table [V, d] that makes logits of them.
        cache: For each layer and sequence the keys and values [K, kept positions, h].
        softcap: The final soft-cap of the logits.
        observe: Called with every block of logits that is made, as `logits`.
    """

    lengths: tuple[int, ...]
    hidden: Sequence[Tensor]
    head: LazyTensor
    cache: Sequence[Sequence[tuple[Tensor, Tensor]]]
    softcap: float | None = None
    observe: Observe | None = None

    def keys(self, layer: int, sequence: int) -> Array:
        """Keys of a layer, rotated, at the positions that were kept: [K, n, h]."""
        return _array(self.cache[layer][sequence][0])

    def values(self, layer: int, sequence: int) -> Array:
        """Values of a layer at the positions that were kept: [K, n, h]."""
        return _array(self.cache[layer][sequence][1])

    def logits(self, sequence: int, start: int = 0, stop: int | None = None) -> Array:
        """Logits of the positions [start, stop) of a sequence, [n, V], all in memory at once."""
        stop = self.lengths[sequence] if stop is None else stop
        return self.logits_at([(sequence, position) for position in range(start, stop)])

    def logits_at(self, places: Sequence[tuple[int, int]]) -> Array:
        """Logits at pairs of sequence and position, [n, V].

        Every call reads the whole head once, so ask for many positions at a time.
        """
        rows = torch.stack([self.hidden[sequence][position] for sequence, position in places])
        logits = head_logits(rows, self.head, self.softcap)
        if self.observe is not None:
            self.observe("logits", logits)
        return logits

    @torch.inference_mode()
    def observe_logits(self) -> None:
        """Shows `observe` what the head gives at all positions, [n, part of V] at a time: it is read once.

        That is the `logits`; where a soft-cap makes those of it, it is `lm_head`, and the cap is their range.
        """
        assert self.observe is not None
        rows = torch.cat(list(self.hidden))
        for part in _head_blocks(rows, self.head):
            self.observe("logits" if self.softcap is None else "lm_head", _array(part))

    def blocks(self, positions: Positions | None = None) -> Iterator[tuple[int, range | list[int], Array]]:
        """Logits in blocks of at most `LOGITS_BLOCK` positions over all sequences together.

        Args:
            positions: The positions wanted of each sequence; all by default.

        Yields:
            A sequence, some positions of it, and their logits [n, V].
        """
        wanted = positions if positions is not None else [range(length) for length in self.lengths]
        places = [(i, position) for i, chosen in enumerate(wanted) for position in chosen]
        for begin in range(0, len(places), LOGITS_BLOCK):
            block = places[begin : begin + LOGITS_BLOCK]
            logits = self.logits_at(block)
            first = 0
            for last in range(1, len(block) + 1):
                if last == len(block) or block[last][0] != block[first][0]:
                    yield block[first][0], [place[1] for place in block[first:last]], logits[first:last]
                    first = last


class Reference:
    """The decoder in fp32 over a checkpoint's lazy weights.

    Memory: one layer in fp32 (2B: 0.44 GB, 7B: 1.1 GB), the hidden states, the activations of `QUERY_BLOCK`
    tokens in one layer, and the keys and values that are kept (7B: 0.9 MB for each position).

    Args:
        config: The model's shape.
        weights: Canonical name → lazy tensor, as `weights.canonical_weights` gives them.
    """

    name = "the checkpoint in fp32, by gemma-export's eager decoder"

    def __init__(self, config: GemmaConfig, weights: Mapping[str, LazyTensor]) -> None:
        self.config = config
        self._weights = weights

    @torch.inference_mode()
    def run(
        self,
        sequences: Sequence[Sequence[int]],
        *,
        observe: Observe | None = None,
        wanted: AbstractSet[str] | None = None,
        after_layer: Callable[[int], None] | None = None,
        keep_cache: bool | Positions = True,
    ) -> ReferenceRun:
        """Runs every sequence, alone and from position 0, through the whole model.

        Args:
            sequences: Token ids; the lengths may differ.
            observe: Called with every activation and its name, as `observation.watch` describes; the
                logits are among them when they are asked of the result.
            wanted: Names of a layer's activations that `observe` is for; None shows it all of them.
            after_layer: Called with a layer's number once every sequence has passed through it.
            keep_cache: Whether to keep keys and values; or, for each sequence, the positions to keep.

        Raises:
            ValueError: A sequence is empty or has a token outside the vocabulary.
        """
        give_back_large_blocks()
        check_sequences(sequences, self.config.vocab_size)
        kept = kept_positions(sequences, keep_cache)
        hidden = self.embed(sequences)
        if observe is not None:
            for x in hidden:
                observe("embedding", _array(x))
        tables = rotary_tables(self.config, max(len(x) for x in hidden))
        layer = empty_module(lambda: DecoderLayer(self.config))
        cache: list[list[tuple[Tensor, Tensor]]] = []
        for i, window in enumerate(self.config.windows):
            _log.debug("reference: layer %d of %d", i + 1, self.config.num_layers)
            prefix = f"layers.{i}"
            self.load(layer, prefix)
            with watch(layer, prefix, observe, wanted):
                cache.append(
                    [
                        self.through(layer, x, tables, keep, window)
                        for x, keep in zip(hidden, kept, strict=True)
                    ]
                )
            if after_layer is not None:
                after_layer(i)
        norm = empty_module(lambda: RMSNorm(self.config.hidden_size, self.config.rms_norm_eps))
        self.load(norm, "norm")
        for i, x in enumerate(hidden):  # Each in the place of what it is of: there is one copy of them all.
            hidden[i] = norm(x)
            if observe is not None:
                observe("norm", _array(hidden[i]))
        lengths = tuple(len(sequence) for sequence in sequences)
        head, cap = self._weights["embed_tokens.weight"], self.config.final_softcap
        return ReferenceRun(lengths, hidden, head, cache, cap, observe)

    def embed(self, sequences: Sequence[Sequence[int]]) -> list[Tensor]:
        """Scaled embeddings of each sequence [T, d], reading only the blocks of rows that are used."""
        table = self._weights["embed_tokens.weight"]
        tokens = [torch.tensor(sequence) for sequence in sequences]
        used, where = torch.unique(torch.cat(tokens), return_inverse=True)
        rows = torch.empty(len(used), self.config.hidden_size)
        for start, stop in _groups(used.tolist(), gap=16, limit=_block_rows(table)):
            inside = (used >= start) & (used < stop)
            rows[inside] = table.read(start, stop).float()[used[inside] - start]
        scaled = rows * self.config.hidden_size**0.5
        return [scaled[part] for part in where.split([len(sequence) for sequence in tokens])]

    def load(self, module: nn.Module, prefix: str) -> None:
        """Fills a module's parameters with those of `prefix`, upcast block by block into the same storage."""
        for name, parameter in module.named_parameters():
            lazy = self._weights[f"{prefix}.{name}"]
            for start, stop, rows in row_blocks(lazy):
                parameter[start:stop].copy_(rows)

    def through(
        self,
        layer: DecoderLayer,
        x: Tensor,
        tables: tuple[Tensor, Tensor],
        keep: Sequence[int],
        window: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Takes one sequence's hidden states [T, d] through a layer, in place; returns the cache kept."""
        length = len(x)
        key = torch.zeros(1, self.config.num_kv_heads, length, self.config.head_dim)
        value = torch.zeros_like(key)
        for start in range(0, length, QUERY_BLOCK):
            positions = torch.arange(start, min(start + QUERY_BLOCK, length))[None]
            cos, sin = (table[positions][:, None] for table in tables)
            mask = causal_mask(positions, length, window)
            block = x[None, start : start + QUERY_BLOCK]
            out, key, value = layer(block, positions, cos, sin, mask, key, value)
            x[start : start + QUERY_BLOCK] = out[0]  # No later block reads these: only its keys and values.
        chosen = torch.tensor(keep, dtype=torch.int64)
        return key[0, :, chosen], value[0, :, chosen]


@torch.inference_mode()
def head_logits(hidden: Tensor, head: LazyTensor, softcap: float | None = None) -> Array:
    """Logits [n, V] of hidden states [n, d], reading the head in blocks of rows."""
    logits = torch.empty(len(hidden), head.shape[0])
    start = 0
    for part in _head_blocks(hidden, head):
        logits[:, start : start + part.shape[1]] = soft_cap(part, softcap)
        start += part.shape[1]
    return _array(logits)


def _head_blocks(hidden: Tensor, head: LazyTensor) -> Iterator[Tensor]:
    """The head's product [n, rows] with hidden states [n, d], one block of its rows after the other."""
    for _, _, rows in row_blocks(head):
        yield nn.functional.linear(hidden, rows.float())


def row_blocks(lazy: LazyTensor) -> Iterator[tuple[int, int, Tensor]]:
    """All rows of a tensor in blocks of at most `BLOCK_BYTES` in fp32: first row, one past the last, rows."""
    step = _block_rows(lazy)
    for start in range(0, lazy.shape[0], step):
        stop = min(start + step, lazy.shape[0])
        yield start, stop, lazy.read(start, stop)


def _block_rows(lazy: LazyTensor) -> int:
    """Rows of a tensor that make a block of `BLOCK_BYTES` in fp32."""
    return max(1, BLOCK_BYTES // (4 * int(np.prod(lazy.shape[1:]))))


def _groups(rows: Sequence[int], *, gap: int, limit: int) -> Iterator[tuple[int, int]]:
    """Ranges of at most `limit` rows that hold all of the ascending `rows` and no hole of `gap` or more."""
    start = last = rows[0]
    for row in rows[1:]:
        if row - last > gap or row - start >= limit:
            yield start, last + 1
            start = row
        last = row
    yield start, last + 1


def empty_module(make: Callable[[], Any]) -> Any:
    """A module in fp32 with storage and no values: what would initialise it costs more than running it."""
    with torch.device("meta"):
        module: nn.Module = make()
    return module.to(torch.float32).to_empty(device="cpu").eval()


def _array(tensor: Tensor) -> Array:
    array: Array = tensor.detach().numpy()
    return array
