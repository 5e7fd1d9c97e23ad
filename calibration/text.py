"""The text that bundles are measured on and calibrated with: the passages that come along, or a file.

A file for calibration is plain text, or has a JSON object on each line: `{"text": …}`, or a dialogue as
`{"messages": [{"role": …, "content": …}, …]}`.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma_export.calibration.passages import PASSAGES
from gemma_export.errors import PromptError

FEWEST_TOKENS = 256
"""A calibration on fewer tokens says more about them than about the model."""

LINES_SUFFIXES = (".jsonl", ".ndjson")
DIALOGUE_KEYS = ("messages", "conversation")
TEXT_KEY = "text"
USER_ROLES = ("user",)
MODEL_ROLES = ("model", "assistant")
SYSTEM_ROLES = ("system",)

_LINES_HINT = (
    'Put one object on each line: {"text": …}, or {"messages": [{"role": "user", "content": …}, …]}.'
)


@dataclass(frozen=True)
class Passage:
    """A piece of text and what to call it in a report."""

    name: str
    text: str


@dataclass(frozen=True)
class Dialogue:
    """Turns of the user and of the model, alternating, the user's first."""

    name: str
    turns: tuple[str, ...]


Document = Passage | Dialogue


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
    text = _read(path)
    pieces = [piece.strip("\n") for piece in re.split(r"\n(?:[^\S\n]*\n)+", text)]
    passages = [piece for piece in pieces if piece.strip()]
    if not passages:
        raise _no_text(path)
    return tuple(Passage(f"{path.name}, passage {i}", text) for i, text in enumerate(passages, start=1))


def read_documents(path: Path | str) -> tuple[Document, ...]:
    """The texts and dialogues of a file: all of a plain text is one, of JSON lines each line is.

    Which of the two it is, its content says: JSON lines begin with a line that is a JSON object. Empty texts
    are left out.

    Args:
        path: A file in UTF-8.

    Raises:
        PromptError: The file is missing, unreadable, not UTF-8, has no text, or a line cannot be used; the
            sentence names the line.
    """
    path = Path(path)
    text = _read(path)
    if not text.strip():
        raise _no_text(path)
    suffix = path.suffix.lower()
    if suffix in LINES_SUFFIXES or _begins_with_object(text):
        documents = tuple(_documents_of_lines(path.name, text))
        if not documents:
            raise _no_text(path)
        return documents
    if suffix == ".json":
        raise PromptError(
            f"{path} is not read as text: it is JSON, and its first line is no object.", _LINES_HINT
        )
    return (Passage(path.name, text),)


def _read(path: Path) -> str:
    """A file's text with line ends as Python has them."""
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
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _no_text(path: Path) -> PromptError:
    return PromptError(f"{path} has no text.", "Give a file with at least a few sentences.")


def _begins_with_object(text: str) -> bool:
    first = text.lstrip().partition("\n")[0]
    try:
        return isinstance(json.loads(first), dict)
    except (ValueError, RecursionError):
        return False


def _documents_of_lines(name: str, text: str) -> Iterator[Document]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            document = _document(f"{name}, line {number}", line)
            if document is not None:
                yield document


def _document(name: str, line: str) -> Document | None:
    """What a line holds; None where that is an empty text."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else error
        raise PromptError(
            f"{name} is not JSON: {reason}.",
            "A file whose first line is a JSON object is read line by line; mend this one or take it out.",
        ) from None
    if not isinstance(value, dict):
        raise PromptError(f"{name} is not a JSON object.", _LINES_HINT)
    for key in DIALOGUE_KEYS:
        if key in value:
            return Dialogue(name, _turns(name, value[key]))
    if TEXT_KEY not in value:
        raise PromptError(f"{name} has neither {TEXT_KEY!r} nor {DIALOGUE_KEYS[0]!r}.", _LINES_HINT)
    text = value[TEXT_KEY]
    if not isinstance(text, str):
        raise PromptError(f"{name}: {TEXT_KEY!r} is not a text.", _LINES_HINT)
    return Passage(name, text) if text.strip() else None


def _turns(name: str, messages: Any) -> tuple[str, ...]:
    """The turns of a dialogue; Gemma has no system prompt, so one is put before the first message."""
    if not isinstance(messages, list) or not messages:
        raise PromptError(f"{name}: the dialogue is not a list of messages.", _LINES_HINT)
    said = [_message(f"{name}, message {i}", message) for i, message in enumerate(messages, start=1)]
    system = said.pop(0)[1] if said[0][0] in SYSTEM_ROLES else None
    for i, (role, _) in enumerate(said):
        if role not in (MODEL_ROLES if i % 2 else USER_ROLES):
            raise PromptError(
                f"{name}: the dialogue has a message of the {role} where the {'model' if i % 2 else 'user'} "
                "speaks.",
                "User and model take turns, the user begins; a system message may stand before that.",
            )
    if not said:
        raise PromptError(f"{name}: the dialogue has no message of the user.", "Add one, or take it out.")
    turns = [content for _, content in said]
    if system is not None:
        turns[0] = f"{system}\n\n{turns[0]}"
    return tuple(turns)


def _message(name: str, message: Any) -> tuple[str, str]:
    """Role and content."""
    if not isinstance(message, dict):
        raise PromptError(f"{name} is not an object with a role and a content.", _LINES_HINT)
    role, content = message.get("role"), message.get("content")
    if role not in (*USER_ROLES, *MODEL_ROLES, *SYSTEM_ROLES):
        raise PromptError(
            f"{name} has the role {role!r}.", "The roles are user, model (or assistant) and system."
        )
    if not isinstance(content, str) or not content.strip():
        raise PromptError(f"{name} has no text in its 'content'.", "Give some, or take the dialogue out.")
    return role, content
