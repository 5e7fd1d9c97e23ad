"""What a person sees: stages and a progress bar while a build runs, and a summary at its end.

A listener turns events into something to look at; there is one for people, one for programs (a JSON object
per line) and, with `events.ignore`, one for silence.
"""

import json
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import TransferSpeedColumn as SpeedColumn
from rich.table import Table

from gemma_export.exporter.events import Event, Note, StageFinished, StageProgress, StageStarted
from gemma_export.runtime.bundle import Manifest

_EVENT_NAMES = {StageStarted: "started", StageProgress: "progress", StageFinished: "finished", Note: "note"}


class Screen:
    """Shows stages as they end, and a bar with bytes and the time left for those that take long."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress(
            TextColumn("  {task.description}"),
            BarColumn(bar_width=32),
            DownloadColumn(binary_units=False),
            SpeedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        self._count = Progress(
            TextColumn("  {task.description}"),
            BarColumn(bar_width=32),
            TextColumn("{task.completed:.0f} of {task.total:.0f} {task.fields[unit]}"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        self._live: tuple[Progress, TaskID] | None = None

    def __call__(self, event: Event) -> None:
        match event:
            case StageStarted(stage, detail):
                self._stop()
                # A line that says what runs; it is replaced by the line that says how it went.
                self._begin(stage, detail)
            case StageProgress(stage, done, total, unit):
                self._show(stage, done, total, unit)
            case StageFinished(stage, seconds, facts):
                self._stop()
                line = ", ".join(f"{key} {_brief(value)}" for key, value in facts.items() if _worth(value))
                self._console.print(
                    f"  [green]✓[/] {stage:<12} [dim]{seconds:6.1f} s[/]  {escape(line)}", highlight=False
                )
            case Note(text):
                self._console.print(f"  [yellow]·[/] {escape(text)}", highlight=False)

    def close(self) -> None:
        """Takes a running bar off the screen."""
        self._stop()

    def _begin(self, stage: str, detail: str) -> None:
        task = self._count.add_task(f"{stage} {escape(detail)}", total=None, unit="")
        self._count.columns = (TextColumn("  [dim]… {task.description}[/]"),)
        self._count.start()
        self._live = (self._count, task)

    def _show(self, stage: str, done: int, total: int, unit: str) -> None:
        progress = self._progress if unit == "bytes" else self._count
        if self._live is None or self._live[0] is not progress or not progress.tasks[-1].total:
            self._stop()
            progress.columns = self._columns(unit)
            progress.start()
            self._live = (progress, progress.add_task(stage, total=total, unit=unit))
        self._live[0].update(self._live[1], completed=done, total=total)

    @staticmethod
    def _columns(unit: str) -> tuple[Any, ...]:
        bar = (TextColumn("  {task.description:<12}"), BarColumn(bar_width=32))
        if unit == "bytes":
            return (*bar, DownloadColumn(binary_units=False), SpeedColumn(), TimeRemainingColumn())
        count = TextColumn("{task.completed:.0f} of {task.total:.0f} {task.fields[unit]}")
        return (*bar, count, TimeRemainingColumn())

    def _stop(self) -> None:
        if self._live is not None:
            progress, task = self._live
            progress.remove_task(task)
            progress.stop()
            self._live = None


class JsonLines:
    """Writes each event as one JSON object on a line of its own."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def __call__(self, event: Event) -> None:
        self.write({"event": _EVENT_NAMES[type(event)], **asdict(event)})

    def write(self, value: dict[str, Any]) -> None:
        """Writes one object."""
        self._console.out(json.dumps(value, ensure_ascii=False), highlight=False)

    def close(self) -> None:
        """Nothing is left to do."""


def bundle_table(manifest: Manifest) -> Table:
    """What a bundle is and what it costs, for people."""
    model, graph = manifest.model, manifest.graph
    heads = f"{model.num_query_heads} query, {model.num_kv_heads} KV heads of {model.head_dim}"
    total = model.parameters.embedding + model.parameters.other
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    rows = {
        "model": f"{model.name}, {total / 1e6:,.1f} M parameters ({model.parameters.embedding / 1e6:,.1f} M "
        "embedding, shared with the head)",
        "shape": f"{model.num_layers} layers of {model.hidden_size}, {heads}, vocabulary {model.vocab_size:,}",
        "precision": f"{manifest.precision} for {manifest.target}: stored {manifest.storage_dtype}, computed "
        f"{manifest.compute_dtype}, cache {manifest.cache_dtype}",
        "graph": f"opset {graph.opset}, cache of {graph.max_length:,} tokens, logits of the {_logits(graph.logits)}",
        "on disk": _bytes(sum(file.size for file in manifest.files.values())),
        "read per token": f"{_bytes(manifest.bytes.per_token)} of weights",
        "cache per row": _bytes(manifest.bytes.cache_per_row),
        "kept in fp32": ", ".join(manifest.fp32_tensors) or "nothing beyond the norms",
        "checkpoint": f"{manifest.checkpoint.form}: {manifest.checkpoint.source or 'unknown'}",
        "parity": parity_line(manifest),
        "built by": f"{manifest.created_by} ({', '.join(f'{k} {v}' for k, v in manifest.tools.items())})",
    }
    if manifest.precision == "fp32":
        del rows["kept in fp32"]
    for name, text in rows.items():
        table.add_row(name, escape(text) if name != "parity" else text)
    return table


def parity_line(manifest: Manifest) -> str:
    """The verdict in a line, with markup."""
    parity = manifest.parity
    if parity.verdict == "not run":
        return "[yellow]not measured[/]"
    figures = parity.figures
    colour = "green" if parity.verdict == "pass" else "red"
    kept = ", kept all the same" if parity.allowed_failure else ""
    numbers = [
        f"{name} {_brief(figures[key])}"
        for key, name in (
            ("max_relative_error", "largest error"),
            ("mean_kl", "KL"),
            ("top1_agreement", "same first choice"),
        )
        if figures.get(key) is not None
    ]
    return f"[{colour}]{parity.verdict}[/] ({parity.level}{kept}): {escape(', '.join(numbers))}"


def _logits(kind: str) -> str:
    return "last token" if kind == "last" else "every token"


def _worth(value: object) -> bool:
    return not isinstance(value, dict) and value is not None


def _brief(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int) and value > 10_000_000:
        return _bytes(value)
    return f"{value:,}" if isinstance(value, int) else str(value)


def _bytes(count: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count} bytes"
