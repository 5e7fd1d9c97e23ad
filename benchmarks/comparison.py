"""How far a quantized model is from its checkpoint in fp32, and the texts that this is measured on."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gemma_export.calibration.text import builtin_texts
from gemma_export.exporter.parity.reference import Reference, ReferenceRun
from gemma_export.exporter.source import Source
from gemma_export.runtime.parity import ParityAccumulator, ParityFigures
from gemma_export.runtime.session import Session
from gemma_export.runtime.tokenizer import Tokenizer

ROWS, LENGTH = 24, 128
"""Of the text that the model writes: rows, and tokens of each with the first, which begins a sequence."""
MEASURED_SEED = 20_000
"""Of that text; what calibrates is written with other seeds."""


PASSAGES = "passages"
"""What the project's own passages are called in a table."""


@dataclass(frozen=True)
class Text:
    """Sequences of token ids, and what to call them in a table."""

    name: str
    sequences: tuple[tuple[int, ...], ...]


def written_text(session: Session, seed: int = MEASURED_SEED, rows: int = ROWS, length: int = LENGTH) -> Text:
    """What a model says by itself, drawn from its own probabilities: nothing is closer to what it knows.

    A row that the model ends sooner is shorter, and there are more of them.

    Args:
        session: The model in fp32.
        seed: Of the first row; each has its own.
        rows: With `length`, how many tokens to write.
        length: The most tokens of a row.
    """
    sequences: list[tuple[int, ...]] = []
    missing = rows * length
    while missing > 1:
        wanted = min(length, missing)
        begin = [session.manifest.tokens.bos]
        written = session.generate_tokens(
            begin, temperature=1.0, seed=seed + len(sequences), max_new_tokens=wanted - 1
        )
        sequences.append((*begin, *written))
        missing -= len(sequences[-1])
    return Text("its own", tuple(sequences))


def passages_text(tokenizer: Tokenizer, length: int) -> Text:
    """The project's own passages, which the parity gate takes."""
    rows = tuple(tuple(tokenizer.encode(passage.text)[:length]) for passage in builtin_texts())
    return Text(PASSAGES, rows)


def file_text(tokenizer: Tokenizer, path: Path, length: int) -> Text:
    """A whole file of plain text, cut into rows of at most `length` tokens that begin a sequence each."""
    bos, *tokens = tokenizer.encode(path.read_text(encoding="utf-8"))
    step = length - 1
    rows = tuple((bos, *tokens[start : start + step]) for start in range(0, len(tokens), step))
    return Text(path.name, rows)


class Comparison:
    """Runs the checkpoint in fp32 over some texts once, and holds against it as many models as one likes.

    Args:
        source: The checkpoint; its logits are made again for every model, so it must be a small one.
        texts: What to compare on.
    """

    def __init__(self, source: Source, texts: Sequence[Text]) -> None:
        reference = Reference(source.config, source.weights)
        self._runs: list[tuple[Text, ReferenceRun]] = [
            (text, reference.run(text.sequences, keep_cache=False)) for text in texts
        ]

    def figures(self, session: Session) -> Iterator[tuple[str, ParityFigures]]:
        """The name of each text, and the figures of a model on it.

        Args:
            session: A bundle that was built with `--logits all`.
        """
        for text, run in self._runs:
            accumulator = ParityAccumulator()
            for i, tokens in enumerate(text.sequences):
                targets = np.array([*tokens[1:], -1])
                accumulator.add(run.logits(i), session.logits(tokens), targets, np.arange(len(tokens)))
            yield text.name, accumulator.figures()


HEADINGS = ("text", "tokens", "mean KL", "perplexity", "same first choice")


def cells(text: str, figures: ParityFigures) -> tuple[str, ...]:
    """A model's figures on a text, under `HEADINGS`."""
    change = figures.perplexity_change
    return (
        text,
        f"{figures.tokens}",
        f"{figures.mean_kl:.2e}",
        f"{math.nan if change is None else change:+.3%}",
        f"{figures.top1_agreement:.2%}",
    )


def print_heading(*names: str) -> None:
    """Prints the first two lines of a Markdown table."""
    print_row(*names)
    print("|" + "---|" * len(names), flush=True)


def print_row(*values: str) -> None:
    """Prints a line of a Markdown table."""
    print(f"| {' | '.join(values)} |", flush=True)
