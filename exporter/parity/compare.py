"""Comparisons of the parity gate: rows of logits in blocks, and cached keys and values by layer.

Symbols in shape comments: K KV heads, h head_dim, V vocabulary, n positions.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from gemma_export.errors import ParityError
from gemma_export.exporter.parity.reference import LOGITS_BLOCK, ReferenceRun
from gemma_export.exporter.parity.report import PHASES, LayerErrors, Phase, PhaseErrors
from gemma_export.runtime.parity import ParityAccumulator, ParityFigures

Array = npt.NDArray[Any]

CACHE_POSITIONS = 64
"""Positions of a sequence whose keys and values are compared: enough to see a slot that is off by one
anywhere, few enough that the reference can keep them (7B: 0.9 MB for each)."""


def sampled_positions(length: int) -> list[int]:
    """At most `CACHE_POSITIONS` positions of a sequence, evenly spread, the first and the last among them."""
    spread = np.linspace(0, length - 1, min(length, CACHE_POSITIONS)).round()
    return [int(position) for position in np.unique(spread)]


@dataclass(frozen=True)
class ComparedRow:
    """What remains of a position's two rows of logits.

    Args:
        phase: How the bundle came to its row.
        error: The largest absolute difference; NaN where a logit is.
        bundle_token: The bundle's most likely next token.
        reference_token: The reference's.
        margin: By how much the reference prefers its own.
    """

    phase: Phase
    error: float
    bundle_token: int
    reference_token: int
    margin: float


class LogitsComparison:
    """Compares rows of the bundle's logits with the reference's, a block at a time.

    Args:
        run: The reference's run; its logits are made when a block is full, since each time costs the head.
    """

    def __init__(self, run: ReferenceRun) -> None:
        self._run = run
        self._waiting: list[tuple[int, int, Phase, int, Array]] = []
        self._accumulator = ParityAccumulator()
        self.rows: dict[tuple[int, int], ComparedRow] = {}
        """What was found at each sequence and position."""
        self.largest_reference = 0.0
        """The largest absolute logit of the reference."""
        self.reference_seconds = 0.0
        """Time that the reference's logits took."""

    def add(self, sequence: int, position: int, phase: Phase, target: int, row: Array) -> None:
        """Takes one row [V]; `target` is the token that follows in the text, -1 where none is known."""
        self._waiting.append((sequence, position, phase, target, row))
        if len(self._waiting) >= LOGITS_BLOCK:
            self.flush()

    def flush(self) -> None:
        """Compares the rows that wait.

        Raises:
            ParityError: The vocabularies differ.
        """
        if not self._waiting:
            return
        sequences, positions, phases, targets, rows = zip(*self._waiting, strict=True)
        self._waiting = []
        begin = time.perf_counter()
        reference = self._run.logits_at(list(zip(sequences, positions, strict=True)))  # [n, V]
        self.reference_seconds += time.perf_counter() - begin
        if rows[0].shape != reference[0].shape:
            raise ParityError(
                f"The bundle gives logits of {rows[0].size} tokens, its reference of {reference[0].size}.",
                "Was the bundle built from this checkpoint?",
            )
        bundle = np.stack(rows)
        self._accumulator.add(reference, bundle, np.array(targets), np.array(positions))
        self.largest_reference = float(np.maximum(self.largest_reference, np.abs(reference).max()))
        for place, phase, a, b in zip(
            zip(sequences, positions, strict=True), phases, reference, bundle, strict=True
        ):
            top, other = int(a.argmax()), int(b.argmax())
            with np.errstate(invalid="ignore"):
                error = float(np.abs(a - b).max())
            self.rows[place] = ComparedRow(phase, error, other, top, float(a[top] - a[other]))

    def rows_of(self, sequence: int) -> list[ComparedRow]:
        """What was found in a sequence, by position."""
        return [self.rows[place] for place in sorted(self.rows) if place[0] == sequence]

    def figures(self) -> ParityFigures:
        """The figures over all rows."""
        return self._accumulator.figures()

    def phases(self) -> tuple[PhaseErrors, ...]:
        """The errors of each phase that was run, by position."""
        found = []
        for phase in PHASES:
            rows = sorted(
                ((position, row) for (_, position), row in self.rows.items() if row.phase == phase),
                key=lambda placed: placed[0],
            )
            if rows:
                found.append(
                    PhaseErrors(
                        phase,
                        tuple(position for position, _ in rows),
                        tuple(row.error for _, row in rows),
                        sum(row.bundle_token == row.reference_token for _, row in rows),
                    )
                )
        return tuple(found)


class _Cache(Protocol):
    def positions(self, layer: int) -> range: ...

    def keys(self, layer: int) -> Array: ...

    def values(self, layer: int) -> Array: ...


class CacheComparison:
    """Compares cached keys and values with the reference's, summed up by layer.

    Args:
        run: The reference's run, with the cache of the positions that are compared.
    """

    def __init__(self, run: ReferenceRun) -> None:
        self._run = run
        # Per layer, keys and values: largest difference, largest reference, sums of their squares.
        self._sums = np.zeros((len(run.cache), 2, 4))

    def add(self, sequence: int, cache: _Cache, positions: Sequence[int]) -> None:
        """Takes a bundle's cache of one row after the whole sequence.

        Args:
            sequence: Which of the reference's it is.
            cache: The bundle's; of a layer that rolls only the last positions are there to be compared.
            positions: Those that the reference has kept of the sequence.
        """
        for layer in range(len(self._sums)):
            held = cache.positions(layer)
            there = [i for i, position in enumerate(positions) if position in held]
            places = [positions[i] - held.start for i in there]
            pairs = (
                (self._run.keys(layer, sequence)[:, there], cache.keys(layer)),
                (self._run.values(layer, sequence)[:, there], cache.values(layer)),
            )
            for part, (reference, filled) in enumerate(pairs):
                bundle = filled[0][:, places].astype(np.float32)  # [K, n, h]
                with np.errstate(invalid="ignore", over="ignore"):
                    difference = bundle - reference
                    largest = np.abs(difference).max(), np.abs(reference).max()
                    squares = np.square(difference, dtype=np.float64).sum(), np.square(reference).sum()
                sums = self._sums[layer, part]
                sums[:2] = np.maximum(sums[:2], largest)  # carries a NaN through
                sums[2:] += squares

    def layers(self) -> tuple[LayerErrors, ...]:
        """The errors of each layer."""
        with np.errstate(invalid="ignore", divide="ignore"):
            largest = self._sums[..., 0] / self._sums[..., 1]
            rms = np.sqrt(self._sums[..., 2] / self._sums[..., 3])
        return tuple(
            LayerErrors(
                layer,
                key_max=float(largest[layer, 0]),
                key_rms=float(rms[layer, 0]),
                value_max=float(largest[layer, 1]),
                value_rms=float(rms[layer, 1]),
            )
            for layer in range(len(self._sums))
        )
