"""The generation loop: chunked prefill, then one step of all rows after the other, until each row ends.

There is one loop, over rows: a single prompt is a batch of one. Every row is prefilled alone into its own
row of the cache and decodes at its own position, so it gets what it would get alone. A step gives one token
of every row, and more where a row's draft holds (`runtime.speculation`).
"""

import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from gemma_export.errors import UsageError
from gemma_export.runtime.backend import Backend, Logits
from gemma_export.runtime.kv_cache import KVCache
from gemma_export.runtime.options import GenerationOptions
from gemma_export.runtime.sampling import Sampler
from gemma_export.runtime.speculation import Drafter
from gemma_export.runtime.text_stream import TextStream
from gemma_export.runtime.tokenizer import Tokenizer

FinishReason = Literal["stop", "length", "context", "interrupted"]
"""Why a generation ended: at a stop token or string, at `max_new_tokens`, at the last slot of the cache, or
by an exception such as Ctrl-C."""

Steps = Generator[None, None, None]
"""Each `next` runs one more step."""


@dataclass(frozen=True)
class GenerationStats:
    """What a generation took. The first token's time is the prefill's; waiting for a reader counts as none.

    Attributes:
        reused_tokens: Tokens that the cache held already.
        prefill_tokens: Tokens run before the first new one.
        prefill_seconds: Until the first new token was chosen.
        new_tokens: Tokens generated.
        decode_seconds: From the first new token to the last.
        draft_tokens: Tokens that were drafted and verified.
        accepted_tokens: How many of them held; each spared a step.
    """

    reused_tokens: int
    prefill_tokens: int
    prefill_seconds: float
    new_tokens: int
    decode_seconds: float
    draft_tokens: int
    accepted_tokens: int

    @property
    def decode_tokens_per_second(self) -> float:
        """Tokens after the first, per second; 0 where there are none."""
        return max(self.new_tokens - 1, 0) / self.decode_seconds if self.decode_seconds else 0.0


@dataclass(frozen=True)
class Completion:
    """One finished row of a batch; `str()` of it is its text."""

    text: str
    tokens: tuple[int, ...]
    finish_reason: FinishReason

    def __str__(self) -> str:
        return self.text


class Row:
    """One sequence that is being generated.

    Args:
        tokens: The ids so far, of which the cache holds the first; new ones are appended to this list.
        options: How to generate, with `stop_tokens` settled.
        tokenizer: Turns the new tokens into text.
        max_length: Slots of a cache row.
    """

    def __init__(
        self, tokens: list[int], options: GenerationOptions, tokenizer: Tokenizer, max_length: int
    ) -> None:
        self.tokens = tokens
        self.pieces: list[str] = []
        self.finish_reason: FinishReason | None = None
        self.draft_tokens = self.accepted_tokens = 0
        self._new: list[int] = []
        self._options = options
        self._sampler = Sampler(options)
        self._drafter = Drafter(tokens, options.draft_tokens)
        self._text = TextStream(tokenizer, options.stop)
        self._max_length = max_length

    @property
    def new_tokens(self) -> tuple[int, ...]:
        """The ids generated so far."""
        return tuple(self._new)

    def choose(self, logits: Logits) -> None:
        """Takes the next token from the logits [V]: adds it and its text, and sees whether it is the last."""
        token = self._sampler(logits, self.tokens)
        if token in (self._options.stop_tokens or ()):
            self.finish_reason = "stop"
        else:
            self.tokens.append(token)
            self._new.append(token)
            self._add_text(self._text.push(token))
            if self._text.stopped:
                self.finish_reason = "stop"
            elif len(self._new) >= self._options.max_new_tokens:
                self.finish_reason = "length"
            elif len(self.tokens) > self._max_length:
                # This token was chosen from the last slot's logits; there is no slot to run it in.
                self.finish_reason = "context"
        if self.finish_reason is not None:
            self._add_text(self._text.flush())

    def draft(self, room: int) -> list[int]:
        """What may follow the tokens, to be verified with the next step.

        Args:
            room: The most tokens that the step has a place for.
        """
        return self._drafter.draft(min(room, self._options.max_new_tokens - len(self._new) - 1))

    def verify(self, draft: Sequence[int], logits: Logits) -> int:
        """Takes the next token from each of the logits [N, V], as long as it is the draft's next one.

        Args:
            draft: The tokens that were run behind the last one, fewer than N.
            logits: After the last token and after each of the draft.

        Returns:
            From how many of the logits a token was chosen: all before the last were the draft's.
        """
        used = 0
        for used, drafted in enumerate((*draft, None), 1):
            self.choose(logits[used - 1])
            if self.finish_reason is not None or self.tokens[-1] != drafted:
                break
        self.draft_tokens += len(draft)
        self.accepted_tokens += used - 1
        return used

    def interrupt(self) -> None:
        """Ends the row where it stands, if it has not ended."""
        self.finish_reason = self.finish_reason or "interrupted"

    def completion(self) -> Completion:
        """The finished row."""
        return Completion("".join(self.pieces), self.new_tokens, self.finish_reason or "interrupted")

    def _add_text(self, text: str) -> None:
        if text:
            self.pieces.append(text)


def run_rows(
    backend: Backend, cache: KVCache, rows: Sequence[Row], chunk: int
) -> Generator[None, None, None]:
    """Generates until every row has ended; each `next` runs one prefill, or one step of all rows.

    The cache's lengths grow only after a step is done, and a row's tokens never fall behind them: closing
    the generator or an exception in it leaves both in agreement.

    Args:
        backend: Runs the graph.
        cache: Its rows hold the first tokens of `rows`, in order, and have room for those they lack.
        rows: As many as the cache has.
        chunk: The most tokens to prefill at once.
    """
    for index, row in enumerate(rows):
        lane = cache if cache.batch == 1 else cache.row(index)
        row.choose(prefill(backend, lane, row.tokens, chunk))
        yield
    while (active := np.array([row.finish_reason is None for row in rows])).any():
        # A row that has ended repeats its last step: the same token at the same position writes the same
        # keys and values again. What stands behind a row's draft, in the step and in its cache, is scratch.
        positions = cache.lengths - ~active
        room = min(cache.max_length - int(positions.max()), cache.longest_step) - 1
        drafts = [row.draft(room) if active[index] else [] for index, row in enumerate(rows)]
        ids = np.zeros((len(rows), 1 + max(map(len, drafts))), np.int64)
        for index, (row, position) in enumerate(zip(rows, positions.tolist(), strict=True)):
            ids[index, : 1 + len(drafts[index])] = row.tokens[position], *drafts[index]
        tokens = ids.shape[1]
        logits = backend.run(ids, positions[:, None] + np.arange(tokens), cache, tokens)
        for index in np.flatnonzero(active).tolist():
            cache.lengths[index] += rows[index].verify(drafts[index], logits[index])
        yield


def check_drafts(backend: Backend, options: GenerationOptions) -> None:
    """Refuses drafts where nothing could verify them.

    Raises:
        UsageError: They are wanted, and the bundle gives the logits of the last token only.
    """
    if options.draft_tokens and not backend.gives_tail:
        raise UsageError(
            "This bundle gives the logits of the last token only, and a draft needs those of all its tokens.",
            "Build it for --target cpu or with `--logits all`, or leave draft_tokens out.",
        )


def prefill(backend: Backend, cache: KVCache, tokens: Sequence[int], chunk: int) -> Logits:
    """Runs the tokens that a cache of one row does not hold yet, at least one, in chunks.

    Returns:
        float32 [V]: the logits of the last token, in a buffer of the backend.
    """
    length, chunk = cache.length, min(chunk, cache.longest_step)
    cache.require(len(tokens) - length)
    for start in range(length, len(tokens), chunk):
        ids = np.array([tokens[start : start + chunk]], np.int64)
        positions = np.arange(start, start + ids.shape[1], dtype=np.int64)[None]
        logits = backend.run(ids, positions, cache)
        cache.advance(ids.shape[1])
    last: Logits = logits[0, -1]
    return last


class Generation:
    """A text that is generated as it is read.

    Iterating gives its pieces as they come; `str()` or any attribute runs it to its end first. It can be
    iterated again: what has been generated is kept.
    """

    def __init__(self, row: Row, steps: Steps, reused_tokens: int) -> None:
        self._row = row
        self._steps = steps
        self._reused_tokens = reused_tokens
        self._prefill_tokens = len(row.tokens) - reused_tokens
        self._prefill_seconds = 0.0
        self._decode_seconds = 0.0

    def __iter__(self) -> Iterator[str]:
        given = 0
        while given < len(self._row.pieces) or self._step():
            if given < len(self._row.pieces):
                yield self._row.pieces[given]
                given += 1

    def __str__(self) -> str:
        return "".join(self)

    def __repr__(self) -> str:
        reason = self._row.finish_reason
        if reason is None:
            return "<Generation, not finished: print it, or iterate it to stream>"
        return f"<Generation of {len(self._row.new_tokens)} tokens ({reason}): {''.join(self._row.pieces)!r}>"

    @property
    def text(self) -> str:
        """The whole text."""
        return str(self)

    @property
    def tokens(self) -> tuple[int, ...]:
        """All new ids, without the stop token, with those of a stop string."""
        self._finish()
        return self._row.new_tokens

    @property
    def finish_reason(self) -> FinishReason:
        """Why it ended."""
        self._finish()
        return self._row.completion().finish_reason

    @property
    def stats(self) -> GenerationStats:
        """What it took."""
        self._finish()
        row = self._row
        return GenerationStats(
            reused_tokens=self._reused_tokens,
            prefill_tokens=self._prefill_tokens,
            prefill_seconds=self._prefill_seconds,
            new_tokens=len(row.new_tokens),
            decode_seconds=self._decode_seconds,
            draft_tokens=row.draft_tokens,
            accepted_tokens=row.accepted_tokens,
        )

    def close(self) -> None:
        """Ends it where it stands."""
        self._steps.close()
        self._row.interrupt()

    def _finish(self) -> None:
        while self._step():
            pass

    def _step(self) -> bool:
        """Runs one more step; False where there is none."""
        if self._row.finish_reason is not None:
            return False
        first = not self._row.new_tokens
        begun = time.perf_counter()
        try:
            next(self._steps)
        except BaseException:
            self.close()
            raise
        seconds = time.perf_counter() - begun
        if first:
            self._prefill_seconds = seconds
        else:
            self._decode_seconds += seconds
        return True
