"""Runs a bundle for the parity gate: drafts, and teacher-forced texts, one row at a time.

Symbols in shape comments: K KV heads, h head_dim, T tokens of a step, V vocabulary.
"""

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from gemma_export.exporter import events
from gemma_export.exporter.parity.compare import CacheComparison, LogitsComparison
from gemma_export.exporter.parity.plan import DraftRun, Plan, TextRun
from gemma_export.exporter.parity.report import Phase


class GateCache(Protocol):
    """What the gate asks of a bundle's cache."""

    def positions(self, layer: int) -> range:
        """The n positions that a layer holds: all, or the last of them."""
        ...

    def keys(self, layer: int) -> npt.NDArray[Any]:
        """The keys of a layer at its positions [1, K, n, h]."""
        ...

    def values(self, layer: int) -> npt.NDArray[Any]:
        """The values of a layer at its positions [1, K, n, h]."""
        ...


class GateSession(Protocol):
    """What the gate asks of a bundle: `runtime.session.Session` is one."""

    @property
    def max_length(self) -> int:
        """Slots of the cache."""
        ...

    def new_cache(self) -> Any:
        """An empty `GateCache` of one row."""
        ...

    def step(self, tokens: npt.NDArray[np.int64], cache: Any) -> npt.NDArray[np.float32]:
        """Runs int64 [1, T] behind what the cache holds: float32 [1, 1, V] or [1, T, V]."""
        ...


@dataclass(frozen=True)
class Draft:
    """Tokens that a bundle added greedily, and the logits [V] that each was chosen from."""

    tokens: tuple[int, ...]
    rows: tuple[npt.NDArray[np.float32], ...]


class Progress:
    """Counts tokens that were run, on either side, and tells of them."""

    def __init__(self, plan: Plan, on_event: events.Listener) -> None:
        tokens = sum(len(run.tokens) for run in plan.texts)
        tokens += sum(len(draft.prompt) + draft.tokens - 1 for draft in plan.drafts)
        self._done, self._total, self._on_event = 0, 2 * tokens, on_event

    def ran(self, tokens: int) -> None:
        """Counts some more."""
        self._done += tokens
        self._on_event(events.StageProgress("parity", self._done, self._total, "tokens"))


class BundleRunner:
    """Steps a session, counting steps, tokens and seconds."""

    def __init__(self, session: GateSession, progress: Progress) -> None:
        self.session = session
        self.progress = progress
        self.steps = self.tokens = 0
        self.seconds = 0.0
        self.logits: Literal["last", "all"] = "last"

    def step(self, tokens: Sequence[int], cache: GateCache) -> npt.NDArray[np.float32]:
        """Logits of a step: [1, V] of its last token, or [T, V]."""
        begin = time.perf_counter()
        logits: npt.NDArray[np.float32] = self.session.step(np.array([tokens], np.int64), cache)[0]
        self.seconds += time.perf_counter() - begin
        self.steps += 1
        self.tokens += len(tokens)
        if len(logits) > 1:
            self.logits = "all"
        self.progress.ran(len(tokens))
        return logits

    def draft(self, run: DraftRun, stop: Collection[int]) -> Draft:
        """Continues a prompt greedily, up to a stop token."""
        cache = self.session.new_cache()
        row = self.step(run.prompt, cache)[-1]
        tokens, rows = [int(row.argmax())], [row.copy()]
        while len(tokens) < run.tokens and tokens[-1] not in stop:
            row = self.step(tokens[-1:], cache)[-1]
            tokens.append(int(row.argmax()))
            rows.append(row)
        self.progress.ran(2 * (run.tokens - len(tokens)))  # What a stop token spares both sides.
        return Draft(tuple(tokens), tuple(rows))

    def run_text(
        self, i: int, text: TextRun, logits: LogitsComparison, cache: CacheComparison, kept: Sequence[int]
    ) -> int:
        """Runs a text teacher-forced and hands on what it gives; returns how many positions had logits.

        Args:
            i: Which of the reference's sequences the text is.
            text: The text and its steps.
            logits: Gets every row.
            cache: Gets the filled cache.
            kept: The positions whose keys and values are compared.
        """
        filled = self.session.new_cache()
        targets = (*text.tokens[1:], -1)
        position = measured = 0
        for number, size in enumerate(text.steps):
            rows = self.step(text.tokens[position : position + size], filled)
            position += size
            phase: Phase = "prefill" if number < len(text.chunks) else "decode"
            for place, row in zip(range(position - len(rows), position), rows, strict=True):
                logits.add(i, place, phase, targets[place], row)
            measured += len(rows)
        cache.add(i, filled, kept)
        return measured
