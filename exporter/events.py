"""What a long command tells while it runs: values, for whoever listens (a screen, a log, a test)."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any


@dataclass(frozen=True)
class StageStarted:
    """A stage began."""

    stage: str
    detail: str = ""


@dataclass(frozen=True)
class StageProgress:
    """How far a stage is; `unit` is what is counted: `bytes`, `tokens` or `turns`."""

    stage: str
    done: int
    total: int
    unit: str


@dataclass(frozen=True)
class StageFinished:
    """A stage ended; `facts` are what it found or made."""

    stage: str
    seconds: float
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Note:
    """Something the user should know that is no error."""

    text: str


Event = StageStarted | StageProgress | StageFinished | Note
Listener = Callable[[Event], None]


def bytes_of(listener: Listener, stage: str) -> Callable[[int, int], None]:
    """What tells a listener of bytes, done and in all, as a stage's progress."""
    return lambda done, total: listener(StageProgress(stage, done, total, "bytes"))


def ignore(event: Event) -> None:
    """A listener that does not listen."""


@contextmanager
def stage(listener: Listener, name: str, detail: str = "") -> Iterator[dict[str, Any]]:
    """Announces a stage, and its end with whatever facts the body leaves in the yielded dict."""
    listener(StageStarted(name, detail))
    facts: dict[str, Any] = {}
    begin = perf_counter()
    yield facts
    listener(StageFinished(name, perf_counter() - begin, facts))
