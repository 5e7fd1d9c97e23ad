"""What several commands show, and where it goes."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.markup import escape

from gemma_export.errors import UsageError
from gemma_export.exporter import events
from gemma_export.exporter.process import err, out
from gemma_export.exporter.screen import JsonLines, Screen
from gemma_export.runtime.bundle import Manifest


@contextmanager
def listening(*, as_json: bool, quiet: bool) -> Iterator[events.Listener]:
    """A listener for the time of a long command; its bars are gone when it ends, however it ends."""
    if quiet:
        yield events.ignore
        return
    listener = JsonLines(out) if as_json else Screen(err)
    try:
        yield listener
    finally:
        listener.close()


def write_json(values: dict[str, Any]) -> None:
    """Writes one JSON object for programs."""
    JsonLines(out).write(values)


def manifest_values(manifest: Manifest) -> dict[str, Any]:
    """A manifest as its file says it."""
    values: dict[str, Any] = json.loads(manifest.to_json())
    return values


def show_result(what: Path, seconds: float | None = None, steps: tuple[str, ...] = ()) -> None:
    """Says that something is ready, and what one can type next."""
    took = "" if seconds is None else f", {seconds:.1f} s"
    then = " Next:" if steps else ""
    out.print(f"\n[bold]{escape(str(what))}[/] is ready{took}.{then}", highlight=False)
    for line in steps:
        out.print(f"  {line}", highlight=False, markup=False)


def show_extra(extra: tuple[str, ...]) -> None:
    """Names the files in a bundle's folder that are not of the bundle."""
    for name in extra:
        out.print(f"[yellow]·[/] {escape(name)} is not of the bundle; nothing reads it.", highlight=False)


def check_new_file(output: Path, example: str, *, force: bool) -> None:
    """Refuses to write over a folder, or over an older file unless told to; before anything takes time.

    Raises:
        UsageError: There is something; `example` is a name that would do.
    """
    if output.is_dir():
        raise UsageError(f"{output} is a folder.", f"Name a file, such as {example}.")
    if os.path.lexists(output) and not force:
        raise UsageError(f"{output} exists.", "Add --force to replace it, or choose another name.")
