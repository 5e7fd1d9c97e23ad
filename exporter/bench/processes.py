"""Runs what is measured in a process of its own, and tells what it needed and what else was running.

A contestant's memory and loading are then its own, whatever measures it. Nothing but JSON goes back and
forth, so that a program of someone else's is run in the same way.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import IO, Any, TypeVar

from gemma_export import errors
from gemma_export.errors import GemmaExportError
from gemma_export.schema import MisshapenError, read_value

T = TypeVar("T")

WORKER = "gemma_export.exporter.bench.worker"
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Ended:
    """A process that has ended.

    Attributes:
        code: Its exit code; negative where a signal ended it.
        out: What it wrote to standard output.
        err: And to standard error.
        peak: The most resident memory, in bytes; not below what the process had that started it.
        others: How many cores all other processes kept busy meanwhile.
    """

    code: int
    out: str
    err: str
    peak: int
    others: float


def environment() -> dict[str, str]:
    """Of a process that measures: its threads are its own, and those of a BLAS would run beside them."""
    return {**os.environ, "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def run_process(command: Sequence[str]) -> Ended:
    """Runs a command to its end; it is killed where this is interrupted."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        begin, busy = perf_counter(), _busy_seconds()
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, env=environment()
        )
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            process.kill()
            process.wait()
            raise
        process.returncode = os.waitstatus_to_exitcode(status)
        seconds, busy = perf_counter() - begin, _busy_seconds() - busy
        own = usage.ru_utime + usage.ru_stime
        others = max(0.0, busy - own) / seconds
        return Ended(process.returncode, _text(out), _text(err), usage.ru_maxrss * 1024, others)


def run_worker(job: str, arguments: Mapping[str, Any], result: type[T]) -> tuple[T, float]:
    """Runs a job of `worker` in a new Python.

    Args:
        job: Its name.
        arguments: Its arguments; dataclasses are given as their fields.
        result: The dataclass that it gives back.

    Returns:
        The result, and how many cores other processes kept busy meanwhile.

    Raises:
        GemmaExportError: What it raised, or it was ended by something else.
        ModuleNotFoundError: A package is missing there.
    """
    ended = run_process([sys.executable, "-m", WORKER, job, json.dumps(arguments, default=asdict)])
    lines = ended.out.splitlines()
    try:
        answer = json.loads(lines[-1])
        if "result" in answer:
            return read_value(answer["result"], result), ended.others
        raised = answer["raised"]
    except (IndexError, KeyError, TypeError, ValueError, MisshapenError):
        raise process_failed(f"The process that measures the {job}", ended) from None
    if raised["error"] == "ModuleNotFoundError":
        raise ModuleNotFoundError(raised["message"], name=raised["hint"])
    raise getattr(errors, raised["error"])(raised["message"], raised["hint"])


def process_failed(what: str, ended: Ended) -> GemmaExportError:
    """The sentence for a process that did not do what it should."""
    last = (ended.err.strip().splitlines() or ["it said nothing"])[-1]
    how = f"was ended by signal {-ended.code}" if ended.code < 0 else f"ended with the code {ended.code}"
    hint = (
        "Is there enough memory? What ends a process for the lack of it sends signal 9."
        if ended.code == -9
        else "Run it alone to see all that it says."
    )
    return GemmaExportError(f"{what} {how}: {last}.", hint)


def own_peak() -> int:
    """The most memory that this process has had resident so far, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def _text(file: IO[bytes]) -> str:
    """All that was written to a file."""
    file.seek(0)
    return file.read().decode("utf-8", "replace")


def _busy_seconds() -> float:
    """Processor time of all cores since the machine was started, idle and waiting aside."""
    user, nice, system, _, _, irq, softirq, steal, *_ = (
        int(ticks) for ticks in Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()[1:]
    )
    return (user + nice + system + irq + softirq + steal) / _TICKS
