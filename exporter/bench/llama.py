"""A turn of llama.cpp: its `llama-bench` on a GGUF file, with tokens that it draws itself.

It tells neither how long it loads nor how long one waits for the first token, and it does not choose among
the logits: decoding is without that.

Source: ggml-org/llama.cpp `tools/llama-bench/README.md`, the output `json`.
"""

import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma_export.errors import GemmaExportError, MissingDependencyError, UsageError
from gemma_export.exporter.bench.processes import process_failed, run_process
from gemma_export.exporter.bench.values import Plan, Timing, Turn

PROGRAM = "llama-bench"
_OTHER_RELEASE = "Take a release of llama.cpp from 2025 or later."


@dataclass(frozen=True)
class LlamaBench:
    """The program and the model that it runs."""

    program: str
    model: Path

    @classmethod
    def find(cls, model: Path) -> "LlamaBench":
        """The program that the shell would find.

        Raises:
            UsageError: There is no such model.
            MissingDependencyError: There is no such program.
        """
        if not model.is_file():
            raise UsageError(f"{model} is not there.", "Give a GGUF file, a checkpoint's folder, or genai.")
        program = shutil.which(PROGRAM)
        if program is None:
            raise MissingDependencyError(
                f"{PROGRAM} is not installed, which runs {model}.",
                "Build llama.cpp and put its programs on the PATH.",
            )
        return cls(program, model)

    def run_turn(self, plan: Plan) -> tuple[Turn, float]:
        """Runs the plan once; also how many cores other processes kept busy meanwhile.

        Raises:
            GemmaExportError: The program failed, or said something else than it is known to say.
        """
        prompts = ["-p", _list(plan.prompts), "-n", "0"]
        new_tokens = ["-p", "0", "-n", str(plan.tokens), "-d", _list(plan.depths)]
        tests: list[dict[str, Any]] = []
        peak, others = 0, 0.0
        for what in [prompts] * bool(plan.prompts) + [new_tokens] * bool(plan.depths):
            shared = ["-m", str(self.model), "-t", str(plan.threads), "-r", "1", "-o", "json"]
            ended = run_process([self.program, *shared, *what])
            peak, others = max(peak, ended.peak), max(others, ended.others)
            if ended.code != 0:
                raise process_failed(f"{PROGRAM} on {self.model}", ended)
            tests += _parsed(ended.out)
        try:
            return _turn(tests, peak), others
        except (KeyError, TypeError, IndexError) as error:
            raise GemmaExportError(
                f"{PROGRAM} wrote a result without {error}.",
                _OTHER_RELEASE,
            ) from None


def _turn(tests: Iterable[dict[str, Any]], peak: int) -> Turn:
    prefill, decode = [], []
    for test in tests:
        seconds = test["samples_ns"][0] / 1e9
        if test["n_gen"]:
            decode.append(Timing(test["n_depth"], test["n_gen"], seconds))
        else:
            prefill.append(Timing(test["n_prompt"], test["n_prompt"], seconds))
    return Turn(None, None, tuple(prefill), tuple(decode), choosing=None, peak=peak)


def _parsed(text: str) -> list[dict[str, Any]]:
    try:
        tests = json.loads(text)
    except ValueError:
        tests = None
    if not isinstance(tests, list):
        raise GemmaExportError(
            f"{PROGRAM} wrote no JSON: {text.strip()[:60]!r}.",
            _OTHER_RELEASE,
        )
    return tests


def _list(numbers: Iterable[int]) -> str:
    return ",".join(map(str, numbers))
