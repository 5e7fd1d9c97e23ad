"""The two texts: reading them, holding out their ends, and laying them out as training rows."""

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import sentencepiece as spm

from recipes.tiny.tokenizer import BOS, END_OF_TURN, EOS, NEWLINE, START_OF_TURN

FILES = {"shakespeare": "shakespeare.txt", "frankenstein": "frankenstein.txt"}
HELD_OUT = 0.05  # The last share of each text, in characters; neither the tokenizer nor the model sees it.
DIALOGUE_SHARE = 0.2  # Share of an epoch's rows that are conversations made of consecutive speeches.
DOCUMENT_SHARE = 0.1  # Share of an epoch's rows that are whole paragraphs closed by <eos>.
LONGEST_SPEECH = 160  # Tokens; a longer speech would crowd the other turns out of a row.


@dataclass(frozen=True)
class Text:
    """One text in two parts.

    Attributes:
        name: Short name, used in the report.
        train: What the tokenizer and the model learn from.
        held_out: The end of the text, kept for measuring.
    """

    name: str
    train: str
    held_out: str


def read_texts(folder: Path) -> list[Text]:
    """Reads both texts and cuts each at the first paragraph end after its training share.

    Args:
        folder: Holds the files named in ``FILES``.

    Returns:
        The texts, in the order of ``FILES``.

    Raises:
        FileNotFoundError: A text is missing; the message says which and what to do.
        ValueError: A text is not UTF-8 or is not laid out in paragraphs.
    """
    texts = []
    for name, file in FILES.items():
        path = folder / file
        if not path.is_file():
            names = " and ".join(FILES.values())
            raise FileNotFoundError(f"{path} is not there; --data must name a folder with {names}.")
        whole = path.read_text(encoding="utf-8")
        cut = whole.find("\n\n", int(len(whole) * (1 - HELD_OUT))) + 2
        if cut < 2:
            raise ValueError(f"{path} ends without a blank line in sight; set its paragraphs apart by one.")
        texts.append(Text(name, whole[:cut], whole[cut:]))
    return texts


def paragraphs(text: str) -> list[str]:
    """Splits a text after each blank line, keeping the line breaks, so that joining gives the text back."""
    return re.findall(r".+?(?:\n{2,}|\Z)", text, flags=re.DOTALL)


def speeches(play: str) -> list[str]:
    """The words of each speech of a play in order, without the speaker's name."""
    bodies = (paragraph.strip().partition(":\n")[2] for paragraph in paragraphs(play))
    return [body for body in bodies if body]


def encode(pieces: spm.SentencePieceProcessor, text: str, dropout: float) -> list[int]:
    """Token ids of a text.

    Args:
        pieces: The tokenizer.
        text: Any text.
        dropout: Probability of leaving out each merge (BPE-dropout); 0 gives the usual ids.
    """
    # SentencePiece salts its generator in every process, so that no seed makes these draws repeat.
    ids: list[int] = pieces.encode(text, enable_sampling=dropout > 0, alpha=dropout, nbest_size=-1)
    return ids


def windows(ids: list[int], length: int, start: int = 0) -> Iterator[list[int]]:
    """Cuts a stream of ids into rows of at most ``length`` ids, each begun by <bos>."""
    for at in range(start, len(ids) - 1, length - 1):
        yield [BOS, *ids[at : at + length - 1]]


def documents(blocks: list[list[int]], length: int, count: int, rng: random.Random) -> Iterator[list[int]]:
    """Rows of consecutive whole paragraphs, <bos> first and <eos> last.

    Args:
        blocks: Ids of each paragraph with its trailing blank line.
        length: Most ids in a row.
        count: Rows wanted.
        rng: Chooses where each row begins and how long it would like to be.
    """
    for _ in range(count):
        at = rng.randrange(len(blocks))
        row, room = [BOS], rng.randint(length // 4, length) - 1
        while at < len(blocks) and len(row) + len(blocks[at]) <= room:
            row += blocks[at]
            at += 1
        if len(row) > 1:
            yield [*row, EOS]


def dialogues(
    pieces: spm.SentencePieceProcessor,
    spoken: list[str],
    length: int,
    count: int,
    dropout: float,
    rng: random.Random,
) -> Iterator[list[int]]:
    """Conversations of consecutive speeches in Gemma's chat layout, as many whole exchanges as fit a row.

    Args:
        pieces: The tokenizer.
        spoken: The words of each speech, in order.
        length: Most ids in a row.
        count: Rows wanted.
        dropout: See ``encode``.
        rng: Chooses where each conversation begins.
    """
    roles = [pieces.encode("user\n"), pieces.encode("model\n")]
    made = 0
    while made < count:
        at = rng.randrange(len(spoken) - 1)
        row = [BOS]
        while at + 1 < len(spoken):
            exchange: list[int] = []
            for role, speech in zip(roles, spoken[at : at + 2], strict=True):
                # People type a line without breaks, so half of what the user says is laid out like that.
                flat = role is roles[0] and rng.random() < 0.5
                words = encode(pieces, speech.replace("\n", " ") if flat else speech, dropout)
                if len(words) > LONGEST_SPEECH:
                    words = []
                    break
                exchange += [START_OF_TURN, *role, *words, END_OF_TURN, NEWLINE]
            if not words or len(row) + len(exchange) > length:
                break
            row += exchange
            at += 2
        if len(row) > 1:
            made += 1
            yield row


def epoch(
    pieces: spm.SentencePieceProcessor, texts: list[Text], length: int, dropout: float, rng: random.Random
) -> list[list[int]]:
    """One pass over the training texts, different each time.

    Args:
        pieces: The tokenizer.
        texts: Both texts.
        length: Most ids in a row.
        dropout: See ``encode``.
        rng: Chooses offsets, starts and the order.

    Returns:
        Shuffled rows of at most ``length`` ids, each begun by <bos>.
    """
    rows: list[list[int]] = []
    blocks: list[list[int]] = []
    for text in texts:
        encoded = [encode(pieces, paragraph, dropout) for paragraph in paragraphs(text.train)]
        blocks += encoded
        stream = [token for block in encoded for token in block]
        rows += windows(stream, length, start=rng.randrange(length - 1))
    per_share = len(rows) / (1 - DIALOGUE_SHARE - DOCUMENT_SHARE)
    rows += documents(blocks, length, round(per_share * DOCUMENT_SHARE), rng)
    spoken = speeches(next(text.train for text in texts if text.name == "shakespeare"))
    rows += dialogues(pieces, spoken, length, round(per_share * DIALOGUE_SHARE), dropout, rng)
    rng.shuffle(rows)
    return rows
