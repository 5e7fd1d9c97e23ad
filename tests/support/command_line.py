"""The command line as tests see it."""

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
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


Invoke = Callable[[Sequence[object]], Outcome]
RunCli = Callable[..., "subprocess.CompletedProcess[str]"]

HEAVY = ("torch", "onnx", "onnxscript", "onnxruntime", "transformers", "matplotlib")
"""What only some commands need."""


# A job that a shell runs in the background ignores Ctrl-C, and so would whatever it starts.
_AS_FROM_A_TERMINAL = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"


def command(arguments: Sequence[object], prelude: str = "") -> list[str]:
    """What runs the command line in a process of its own, after some lines of Python."""
    script = f"{_AS_FROM_A_TERMINAL}\n{prelude}\nfrom gemma_export.exporter.cli import main\nmain()"
    return [sys.executable, "-c", script, *map(str, arguments)]


def without(*packages: str) -> str:
    """Lines of Python after which packages are not there."""
    return f"import sys; sys.modules |= dict.fromkeys({packages!r})"


def outcome_of(ended: "subprocess.CompletedProcess[str]") -> Outcome:
    """What a process of its own did."""
    return Outcome(ended.returncode, ended.stdout, ended.stderr)


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
