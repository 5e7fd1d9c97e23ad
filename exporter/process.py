"""A command as a process: its streams, its signals, and the one place that turns an error into an exit code.

Exit codes: 0 done, 1 it failed, 2 it was asked for wrongly, 128 + n ended by the signal n (130: Ctrl-C).
"""

import os
import signal
import sys
from collections.abc import Callable
from io import TextIOWrapper
from types import FrameType
from typing import NoReturn

from rich.console import Console
from rich.markup import escape

from gemma_export.errors import GemmaExportError, MissingDependencyError, StorageError

DEBUG = "GEMMA_EXPORT_DEBUG"
"""Set to 1, this environment variable shows the traceback of a defect."""

_INTERRUPTED = tuple(128 + number for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP))

# The packages of each extra, by the name they are imported under.
_EXTRAS = {
    "torch": "export",
    "onnx": "export",
    "onnx_ir": "export",
    "onnxscript": "export",
    "safetensors": "export",
    "tokenizers": "export",
    "onnxruntime": "cpu",
    "transformers": "parity",
    "matplotlib": "parity",
}

out = Console(soft_wrap=True)
err = Console(stderr=True, soft_wrap=True)


def run(command: Callable[[], None]) -> None:
    """Runs a command to an exit code, whatever happens in it."""
    _prepare_process()
    try:
        command()
    except SystemExit as end:
        if end.code in _INTERRUPTED:
            _tell_interrupted()
        raise
    except GemmaExportError as error:
        _fail(error)
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0]
        extra = _EXTRAS.get(package)
        if extra is None:
            _defect(error)
        _fail(
            MissingDependencyError(
                f"The package {package} is not installed.",
                f'Install it: pip install "gemma-export[{extra}]"',
            )
        )
    except OSError as error:
        _drop_output()
        _fail(StorageError(f"The system refused: {error}.", "Check the disk and the permissions."))
    except Exception as error:
        code = _interruption(error)
        if code is None:
            _defect(error)
        _tell_interrupted()
        sys.exit(code)


def _prepare_process() -> None:
    """Streams that take any text, and an orderly end when another process asks for one."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if isinstance(sys.stdin, TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # What is not UTF-8 is refused where it is a prompt.
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, _end)


def _end(number: int, frame: FrameType | None) -> None:
    """Ends the process through every `finally`, as Ctrl-C does."""
    sys.exit(128 + number)


def _interruption(error: BaseException) -> int | None:
    """The exit code of the signal that an error on the way out hides; None where there was none.

    A signal may come while a library enters a context; leaving that then fails.
    """
    hidden = error.__context__
    while hidden is not None:
        if isinstance(hidden, SystemExit) and hidden.code in _INTERRUPTED:
            return int(hidden.code)
        if isinstance(hidden, KeyboardInterrupt):
            return 128 + signal.SIGINT
        hidden = hidden.__context__
    return None


def _tell_interrupted() -> None:
    err.print("\nInterrupted. A bundle that was not finished is gone.", highlight=False)


def _drop_output() -> None:
    """Where output cannot be written, what a buffer still holds is not tried again when Python exits."""
    try:
        sys.stdout.flush()
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def _fail(error: GemmaExportError) -> NoReturn:
    show_error(error)
    sys.exit(error.exit_code)


def _defect(error: Exception) -> NoReturn:
    """Reports what should not happen, without a traceback unless one is asked for."""
    if os.environ.get(DEBUG) == "1":
        raise error
    err.print(f"[bold red]defect:[/] {type(error).__name__}: {escape(str(error))}", highlight=False)
    err.print(f"[bold]hint:[/] Please report it, with what is shown when {DEBUG}=1 is set.", highlight=False)
    sys.exit(1)


def show_error(error: GemmaExportError) -> None:
    """The sentence and the hint."""
    err.print(f"[bold red]error:[/] {escape(error.message)}", highlight=False)
    err.print(f"[bold]hint:[/] {escape(error.hint)}", highlight=False)
