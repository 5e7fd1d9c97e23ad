"""Cuts texts and dialogues into the windows of tokens that a calibration runs.

A window begins with the beginning-of-sequence token, without which the model is lost. What is shorter than a
window is used as it is; of what is longer, and of many, some are chosen, spread evenly over the file.
"""

import hashlib
from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np

from gemma_export.calibration.text import FEWEST_TOKENS, Dialogue, Document, Passage
from gemma_export.errors import BundleError, PromptError
from gemma_export.runtime.chat import ChatFormat
from gemma_export.runtime.tokenizer import BOS_PIECE, Tokenizer

SLAB_CHARACTERS = 32
"""For each token of a window: more than a token has, so that a slab of text fills a window."""


def cut_windows(
    documents: Sequence[Document], tokenizer: Tokenizer, *, samples: int, length: int, seed: int
) -> list[list[int]]:
    """Windows of tokens, in the order of the text.

    Only so much of a long text is tokenized that there is a choice.

    Args:
        documents: What `text.read_documents` gives.
        tokenizer: The model's.
        samples: The most windows.
        length: The most tokens of a window, the beginning-of-sequence token among them; at least 2.
        seed: Of the choice.

    Raises:
        PromptError: They have fewer than `FEWEST_TOKENS` tokens together, or a text cannot be encoded.
    """
    random = np.random.default_rng(seed)
    whole: list[bool] = []
    windows: list[list[int]] = []
    for document in _thinned(documents, samples, SLAB_CHARACTERS * length, random):
        tokens = document_tokens(document, tokenizer)
        for start in range(0, len(tokens), length - 1):
            window = [tokenizer.bos, *tokens[start : start + length - 1]]
            whole.append(start == 0 or len(window) == length)
            windows.append(window)
    if sum(whole) >= samples:  # What is left at the end of a text is only taken where there is little.
        windows = [window for window, keep in zip(windows, whole, strict=True) if keep]
    chosen = [windows[i] for i in evenly(len(windows), samples, random)]
    count = sum(len(window) for window in chosen)
    if count < FEWEST_TOKENS:
        remedy = (
            "Give longer texts, or more --calibration-samples."
            if len(chosen) < len(windows)
            else "Give more text, or leave --calibration-data out: the model then writes its own."
        )
        raise PromptError(
            f"The text gives {count} tokens, and a calibration needs at least {FEWEST_TOKENS}.", remedy
        )
    return chosen


def document_tokens(document: Document, tokenizer: Tokenizer) -> list[int]:
    """A document's tokens without the beginning-of-sequence token; a dialogue as the runtime feeds it.

    Raises:
        PromptError: It cannot be encoded; the sentence names the place in the file.
    """
    try:
        if isinstance(document, Passage):
            return tokenizer.encode_plain(document.text.removeprefix(BOS_PIECE))
        return _dialogue_tokens(document, tokenizer)
    except PromptError as error:
        raise PromptError(f"{document.name}: {error.message}", error.hint) from None
    except BundleError:
        raise PromptError(
            f"{document.name} is a dialogue, and this model's tokenizer has no turns.",
            'Give plain text, or {"text": …} on each line.',
        ) from None


def token_digest(sequences: Sequence[Sequence[int]]) -> str:
    """SHA-256 of token ids, written in decimal with a space between them and a line for each sequence."""
    lines = (" ".join(map(str, sequence)) + "\n" for sequence in sequences)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def evenly(count: int, chosen: int, random: np.random.Generator) -> list[int]:
    """Ascending indices below `count`, one drawn from each of `chosen` parts of equal size; or all."""
    if count <= chosen:
        return list(range(count))
    edges = [part * count // chosen for part in range(chosen + 1)]
    return [int(random.integers(low, high)) for low, high in pairwise(edges)]


def _dialogue_tokens(dialogue: Dialogue, tokenizer: Tokenizer) -> list[int]:
    chat = ChatFormat(tokenizer)
    tokens: list[int] = []
    for i, turn in enumerate(dialogue.turns):
        tokens += chat.encode_user_text(turn) + chat.close_turn() if i % 2 else chat.user_turn(turn)
    return tokens


def _thinned(
    documents: Sequence[Document], samples: int, size: int, random: np.random.Generator
) -> Sequence[Document]:
    """All documents; or, where they have more than `samples` slabs of `size` characters, some slabs."""
    total = sum(_characters(document) for document in documents)
    if total <= samples * size:
        return documents
    slabs = [slab for document in documents for slab in _slabs(document, size)]
    wanted = max(samples, -(-len(slabs) * samples * size // total))
    return [slabs[i] for i in evenly(len(slabs), wanted, random)]


def _characters(document: Document) -> int:
    return len(document.text) if isinstance(document, Passage) else sum(map(len, document.turns))


def _slabs(document: Document, size: int) -> Iterator[Document]:
    """A text in parts of at most `size` characters that end with a line, or at least with a word."""
    if isinstance(document, Dialogue):
        yield document
        return
    text, start = document.text, 0
    while start < len(text):
        stop = start + size
        if stop < len(text):
            # An end in the first half would make a slab too short for a window.
            ends = (text.rfind(mark, start + size // 2, stop) for mark in ("\n", " "))
            stop = next((end + 1 for end in ends if end >= 0), stop)
        yield Passage(document.name, text[start:stop])
        start = stop
