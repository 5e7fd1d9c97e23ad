"""What the parity gate runs: which texts, how much of each, in steps of which sizes.

Everything follows from the level, the texts and the cache's size, so two builds are measured alike.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, cycle, islice

from gemma_export.exporter.parity.report import Level

BEYOND = 32
"""Tokens beyond the window of a local layer: the last of them are run one by one."""
CHUNKS = (1, 2, 5, 17, 32, 64, 128)
"""Sizes of prefill steps: one token, few, odd, powers of two; each text begins at another of them."""


@dataclass(frozen=True)
class Extent:
    """How much a level measures.

    Args:
        texts: How many texts; None takes all.
        text_tokens: Most tokens of each.
        decoded: Most tokens at the end of each that are run one by one.
        drafts: How many prompts are continued.
        prompt_tokens: Most tokens of each prompt.
        draft_tokens: Tokens that are drafted.
        fill: Most tokens of one sequence that fills the cache to its last slot; 0 for none.
    """

    texts: int | None
    text_tokens: int
    decoded: int
    drafts: int
    prompt_tokens: int
    draft_tokens: int
    fill: int


EXTENTS: dict[Level, Extent] = {
    "quick": Extent(texts=4, text_tokens=48, decoded=16, drafts=3, prompt_tokens=24, draft_tokens=14, fill=0),
    "full": Extent(
        texts=None, text_tokens=512, decoded=64, drafts=6, prompt_tokens=64, draft_tokens=64, fill=2048
    ),
}


@dataclass(frozen=True)
class TextRun:
    """A text and the sizes of the steps it is run in: chunks of the prefill, then ones."""

    name: str
    tokens: tuple[int, ...]
    chunks: tuple[int, ...]

    @property
    def steps(self) -> tuple[int, ...]:
        """All step sizes; they sum up to the text."""
        return self.chunks + (1,) * (len(self.tokens) - sum(self.chunks))


@dataclass(frozen=True)
class DraftRun:
    """A prompt, run in one step, and how many tokens the bundle adds."""

    name: str
    prompt: tuple[int, ...]
    tokens: int


@dataclass(frozen=True)
class Plan:
    """All that is run."""

    texts: tuple[TextRun, ...]
    drafts: tuple[DraftRun, ...]


def make_plan(
    level: Level,
    texts: Sequence[Sequence[int]],
    names: Sequence[str],
    max_length: int,
    bos: int,
    window: int | None = None,
) -> Plan:
    """The plan for some texts.

    A wrong window shows beyond it only, and a cache that rolls wrongly where it has begun again, so at every
    level one sequence goes there, where the cache does.

    Args:
        level: How much.
        texts: Token ids of each text, the beginning-of-sequence token first.
        names: What to call each.
        max_length: Slots of the cache.
        bos: The beginning-of-sequence token.
        window: Tokens that a local layer sees, or that its cache keeps where that rolls; None without
            such layers.

    Raises:
        ValueError: There is no text, or one does not begin with `bos`: without it no figure means anything.
    """
    if not texts:
        raise ValueError("there is no text to measure on")
    for name, tokens in zip(names, texts, strict=True):
        if not tokens or tokens[0] != bos:
            raise ValueError(f"the text {name!r} does not begin with token {bos}")
    extent = EXTENTS[level]
    count = len(texts) if extent.texts is None else min(extent.texts, len(texts))
    limit = min(extent.text_tokens, max_length)
    runs = [
        _text_run(names[i], texts[i][:limit], extent.decoded, first_chunk=i % len(CHUNKS))
        for i in range(count)
    ]
    fill = extent.fill
    if window is not None and window < max_length:
        fill = max(fill, window + BEYOND)
    if fill:
        length = min(fill, max_length)
        bodies = [tokens[1:] for tokens in texts if len(tokens) > 1]
        filling = chain([bos], chain.from_iterable(cycle(bodies) if bodies else cycle([[bos]])))
        name = "the texts in a row, to the last slot" if length == max_length else "the texts in a row"
        runs.append(_text_run(name, tuple(islice(filling, length)), extent.decoded, first_chunk=0))
    return Plan(tuple(runs), tuple(_draft_runs(extent, texts, names, max_length, skip=count)))


def _text_run(name: str, tokens: Sequence[int], decoded: int, *, first_chunk: int) -> TextRun:
    prefill = len(tokens) - min(decoded, len(tokens) // 2)
    chunks: list[int] = []
    for size in islice(cycle(CHUNKS), first_chunk, None):
        if sum(chunks) == prefill:
            break
        chunks.append(min(size, prefill - sum(chunks)))
    return TextRun(name, tuple(tokens), tuple(chunks))


def _draft_runs(
    extent: Extent, texts: Sequence[Sequence[int]], names: Sequence[str], max_length: int, *, skip: int
) -> list[DraftRun]:
    """Drafts after the beginnings of the texts that are not run otherwise, as far as there are any."""
    drafts = []
    for i in range(min(extent.drafts, len(texts))):
        at = (skip + i) % len(texts)
        # The last token drafted is never fed back, so it needs no slot.
        room = min(extent.prompt_tokens, max(1, max_length + 1 - extent.draft_tokens))
        prompt = tuple(texts[at][:room])
        drafts.append(DraftRun(names[at], prompt, min(extent.draft_tokens, max_length + 1 - len(prompt))))
    return drafts
