"""Decoding with drafts beside decoding without, in turns, on texts that repeat themselves and on a new one.

    python benchmarks/speculation.py bundles/gemma-2b-int8-cpu
    python benchmarks/speculation.py BUNDLE --free "Once upon a time"      the bundle's own words, greedily

The texts are given: an edit of code, a summary that quotes, and prose. Every step is run as it is, and its
logits are raised at the token that the text has next: a step costs what it costs this bundle, and drafts hold
as often as they do for a model that writes this. Whether a model does write it is not measured.
"""

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from gemma_export.calibration.passages import DIALOGUE, NUMBERS, PROSE, PYTHON
from gemma_export.runtime.backend import Backend, Ids, Logits
from gemma_export.runtime.generate import GenerationStats
from gemma_export.runtime.kv_cache import KVCache
from gemma_export.runtime.options import GenerationOptions
from gemma_export.runtime.session import Session, load

CERTAIN = np.float32(1e6)


class ScriptedBackend:
    """A backend whose largest logits are those of a given text."""

    def __init__(self, backend: Backend, text: Sequence[int]) -> None:
        self._backend, self._text = backend, text
        self.logits, self.gives_tail = backend.logits, backend.gives_tail

    def new_cache(self, batch: int) -> KVCache:
        """As `Backend.new_cache`."""
        return self._backend.new_cache(batch)

    def run(self, input_ids: Ids, position_ids: Ids, cache: KVCache, tail: int = 1) -> Logits:
        """As `Backend.run`, of one row."""
        logits = self._backend.run(input_ids, position_ids, cache, tail)
        for row, position in zip(logits[0, ::-1], position_ids[0, ::-1].tolist(), strict=False):
            # Behind the text comes what comes.
            row[self._text[min(position + 1, len(self._text) - 1)]] = CERTAIN
        return logits


def scripts() -> dict[str, tuple[str, str]]:
    """Prompts and what follows them, by name."""
    edited = (
        PYTHON.replace("averages", "means").replace("total", "running").replace("old, new", "last, next_")
    )
    first, *others = (
        sentence.strip() for sentence in PROSE.replace("\n", " ").split(".") if sentence.strip()
    )
    quoting = "".join(
        f"Of the rest it says: “{sentence}.” That is what we have to know about {place} of it. "
        for place, sentence in enumerate(others, 1)
    )
    return {
        "edit of code": (f"{PYTHON}\n\nThe same with other names:\n\n", edited),
        "summary that quotes": (f"{PROSE}\n\nIt begins thus: “{first}.” ", quoting),
        "prose": (PROSE, f"\n\n{DIALOGUE}{NUMBERS}"),
    }


def compare(session: Session, prompt: Sequence[int], tokens: int, drafts: int, repeats: int) -> list[str]:
    """Cells of a row: both speeds, their ratio, drafts, steps, and whether the tokens are the same."""
    found: dict[int, list[GenerationStats]] = {0: [], drafts: []}
    written: dict[int, tuple[int, ...]] = {}
    for _ in range(repeats):
        for count, stats in found.items():
            options = GenerationOptions(max_new_tokens=tokens, draft_tokens=count, stop_tokens=())
            generation = session.new_prompt_cache().generate(
                session._backend, session.tokenizer, prompt, options
            )
            stats.append(generation.stats)
            written[count] = generation.tokens
    plain, drafted = (
        statistics.median(stats.decode_tokens_per_second for stats in found[count]) for count in (0, drafts)
    )
    last = found[drafts][-1]
    return [
        f"{plain:.1f}",
        f"{drafted:.1f}",
        f"{drafted / plain:.2f}",
        f"{last.accepted_tokens} of {last.draft_tokens}",
        f"{last.new_tokens - last.accepted_tokens} for {last.new_tokens}",
        "yes" if written[0] == written[drafts] else "no",
    ]


def main() -> None:
    """Prints a row for each text."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--tokens", type=int, default=128, help="of the continuation")
    parser.add_argument("--draft-tokens", type=int, default=7)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--free", metavar="PROMPT", help="continue this, and give no text")
    arguments = parser.parse_args()
    session = load(arguments.bundle, threads=arguments.threads)
    table = Table("text", "plain, tok/s", "with drafts", "ratio", "held", "steps", "same tokens")
    rest = (arguments.tokens, arguments.draft_tokens, arguments.repeats)
    if arguments.free is not None:
        table.add_row("its own", *compare(session, session.tokenizer.encode(arguments.free), *rest))
    else:
        backend = session._backend
        for name, (before, after) in scripts().items():
            text = session.tokenizer.encode(before)
            # The end of a prompt that is too long for the cache; the beginning belongs to every text.
            text = [text[0], *text[1:][-(session.max_length - arguments.tokens - 1) :]]
            continuation = session.tokenizer.encode_plain(after)
            scripted = Session(session.bundle, ScriptedBackend(backend, [*text, *continuation]))
            tokens = min(arguments.tokens, len(continuation))
            table.add_row(name, *compare(scripted, text, tokens, *rest[1:]))
    Console().print(table)


if __name__ == "__main__":
    main()
