"""The command line as tests see it."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Outcome:
    """What a run of the command line did."""

    code: int
    out: str
    err: str

    @property
    def events(self) -> list[dict[str, Any]]:
        """The JSON object on each line of the output; NaN and Infinity are no JSON."""
        return [json.loads(line, parse_constant=_refuse) for line in self.out.splitlines()]


# A job that a shell runs in the background ignores Ctrl-C, and so would whatever it starts.
_AS_FROM_A_TERMINAL = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"


def command(arguments: Sequence[object], prelude: str = "") -> list[str]:
    """What runs the command line in a process of its own, after some lines of Python."""
    script = f"{_AS_FROM_A_TERMINAL}\n{prelude}\nfrom gemma_export.exporter.cli import main\nmain()"
    return [sys.executable, "-c", script, *map(str, arguments)]


def assert_refused(outcome: Outcome, code: int, *words: str) -> None:
    """One sentence that has these words, one hint, no traceback, nothing on standard output."""
    lines = outcome.err.splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    hints = [line for line in lines if line.startswith("hint: ")]
    assert (outcome.code, len(errors), len(hints)) == (code, 1, 1), outcome.err
    for word in words:
        assert word in errors[0], errors[0]
    assert errors[0].endswith(".")
    assert len(hints[0]) > len("hint: ")
    assert "Traceback" not in outcome.err
    assert not outcome.out


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")
