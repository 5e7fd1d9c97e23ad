"""`python -m gemma_export.exporter.bench.worker JOB ARGUMENTS`: one measurement, in this process alone.

The last line of its output is a JSON object: {"result": …}, or {"raised": …}.
"""

import json
import sys
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from gemma_export.errors import GemmaExportError
from gemma_export.exporter.bench.processes import own_peak
from gemma_export.exporter.bench.values import Machine, Plan, StepParts, Turn
from gemma_export.schema import read_value


def machine(threads: int) -> Machine:
    """What the machine can do."""
    from gemma_export.exporter.bench.machine import measure_machine

    return measure_machine(threads)


def bundle(path: str, plan: dict[str, Any], on_cpu: bool) -> Turn:
    """A turn of a bundle."""
    with suppress(ImportError):  # An engine needs none; who needs one says so.
        import onnxruntime  # noqa: F401 - its import is not part of loading a bundle
    from gemma_export.exporter.bench.bundle import run_turn
    from gemma_export.exporter.bench.reading import Reading
    from gemma_export.runtime.session import load

    settled = read_value(plan, Plan)
    with Reading(settled.threads) if on_cpu else nullcontext() as reading:
        rate = None if reading is None else reading.rate
        turn = run_turn(lambda: load(path, threads=settled.threads), settled, read_rate=rate)
    return replace(turn, peak=own_peak())


def step(path: str, depth: int, tokens: int, threads: int) -> StepParts:
    """Where the time of a decoded token goes."""
    from gemma_export.exporter.bench.step import measure_step

    return measure_step(Path(path), depth, tokens, threads)


def genai(path: str, plan: dict[str, Any]) -> Turn:
    """A turn of onnxruntime-genai."""
    from gemma_export.exporter.bench.genai import run_turn

    return replace(run_turn(Path(path), read_value(plan, Plan)), peak=own_peak())


def hugging_face(path: str, checkpoint: str, plan: dict[str, Any]) -> Turn:
    """A turn of transformers."""
    from gemma_export.exporter.bench.hugging_face import run_turn

    return replace(run_turn(Path(path), Path(checkpoint), read_value(plan, Plan)), peak=own_peak())


JOBS: dict[str, Callable[..., Any]] = {
    "machine": machine,
    "bundle": bundle,
    "step": step,
    "genai": genai,
    "hugging_face": hugging_face,
}


def main() -> None:
    """Runs the job that the command line names."""
    job, arguments = sys.argv[1:]
    try:
        answer: dict[str, Any] = {"result": asdict(JOBS[job](**json.loads(arguments)))}
    except GemmaExportError as error:
        answer = {"raised": {"error": type(error).__name__, "message": error.message, "hint": error.hint}}
    except ModuleNotFoundError as error:
        answer = {"raised": {"error": "ModuleNotFoundError", "message": str(error), "hint": error.name}}
    sys.stdout.write("\n" + json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
