"""The text that bundles are measured on and calibrated with: the passages that come along, or a file."""

import re
from dataclasses import dataclass
from pathlib import Path

from gemma_export.calibration.passages import PASSAGES
from gemma_export.errors import PromptError


@dataclass(frozen=True)
class Passage:
    """A piece of text and what to call it in a report."""

    name: str
    text: str


def builtin_texts() -> tuple[Passage, ...]:
    """A dozen short passages of different kinds, some 40 to 150 tokens each; the first differ most."""
    return tuple(Passage(name, text) for name, text in PASSAGES.items())


def read_texts(path: Path | str) -> tuple[Passage, ...]:
    """The passages of a text file, which blank lines separate.

    A passage may be of any length: what is too long for a purpose is cut by tokens where it is used.

    Args:
        path: A file of plain text in UTF-8; a byte-order mark is not part of the text.

    Raises:
        PromptError: The file is missing, unreadable, not UTF-8, or has no text.
    """
    path = Path(path)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise PromptError(f"There is no file {path}.", "Check the path of the text.") from None
    except UnicodeDecodeError as error:
        raise PromptError(
            f"{path} is not UTF-8: byte {error.start} cannot be decoded.",
            "Give plain text, and convert it to UTF-8 first.",
        ) from None
    except OSError as error:
        raise PromptError(
            f"{path} cannot be read: {error.strerror or error}.", "Give a plain text file that you may read."
        ) from None
    unified = text.replace("\r\n", "\n").replace("\r", "\n")
    pieces = [piece.strip("\n") for piece in re.split(r"\n(?:[^\S\n]*\n)+", unified)]
    passages = [piece for piece in pieces if piece.strip()]
    if not passages:
        raise PromptError(f"{path} has no text.", "Give a file with at least a few sentences.")
    return tuple(Passage(f"{path.name}, passage {i}", text) for i, text in enumerate(passages, start=1))
