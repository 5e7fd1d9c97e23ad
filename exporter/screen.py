"""What a person sees: stages and a progress bar while a build runs, and a summary at its end.

A listener turns events into something to look at; there is one for people, one for programs (a JSON object
per line) and, with `events.ignore`, one for silence.
"""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.table import Table
from rich.text import Text

from gemma_export.exporter.events import Event, Note, StageFinished, StageProgress, StageStarted
from gemma_export.exporter.parity.page_quantized import cache_line
from gemma_export.exporter.parity.report import ParityReport, json_values
from gemma_export.runtime.bundle import Manifest
from gemma_export.runtime.rolling import RollingCache

_EVENT_NAMES = {StageStarted: "started", StageProgress: "progress", StageFinished: "finished", Note: "note"}
MOST_KEPT = 12
"""Layers that are listed one by one."""
_UNITS = (("GB", 1e9), ("MB", 1e6), ("kB", 1e3))


class Screen:
    """Shows a line for each stage that ended and, on a terminal, a bar for the one that runs."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress(
            TextColumn("  {task.description:<12}"),
            BarColumn(bar_width=20),
            _Amount(),
            console=console,
            transient=True,
            disable=not console.is_interactive,
        )
        self._running: TaskID | None = None

    def __call__(self, event: Event) -> None:
        """Shows an event."""
        match event:
            case StageStarted(stage, detail):
                self._end_stage()
                self._progress.start()
                self._running = self._progress.add_task(stage, total=None, unit="", detail=detail)
            case StageProgress(_, done, total, unit) if self._running is not None:
                self._progress.update(self._running, completed=done, total=total, unit=unit)
            case StageFinished(stage, seconds, facts):
                self._end_stage()
                line = ", ".join(f"{key} {_brief(value)}" for key, value in facts.items() if _worth(value))
                self._console.print(
                    f"  [green]✓[/] {stage:<12} [dim]{seconds:6.1f} s[/]  {escape(line)}", highlight=False
                )
            case Note(text):
                self._console.print(f"  [yellow]·[/] {escape(text)}", highlight=False)

    def close(self) -> None:
        """Takes a running bar off the screen."""
        self._end_stage()
        if self._progress.live.is_started:
            self._progress.stop()

    def _end_stage(self) -> None:
        if self._running is not None:
            self._progress.remove_task(self._running)
            self._running = None


class _Amount(ProgressColumn):
    """How much of a stage is done, how fast it goes, and how long it still takes: as far as that is known."""

    def render(self, task: Task) -> Text:
        """The text behind the bar."""
        if task.total is None:
            return Text(task.fields["detail"], style="dim")
        if task.fields["unit"] == "bytes":
            unit, size = unit_of(task.total)
            parts = [f"{task.completed / size:.2f} of {task.total / size:.2f} {unit}"]
            parts += [f"{bytes_text(int(task.speed))}/s"] if task.speed else []
        else:
            parts = [f"{task.completed:,.0f} of {task.total:,.0f} {task.fields['unit']}"]
        if task.time_remaining is not None:
            parts.append(f"{timedelta(seconds=int(task.time_remaining))} left")
        return Text(", ".join(parts))


class JsonLines:
    """Writes each event as one JSON object on a line of its own; what is no number in JSON is null."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def __call__(self, event: Event) -> None:
        """Writes an event."""
        self.write({"event": _EVENT_NAMES[type(event)], **asdict(event)})

    def write(self, value: dict[str, Any]) -> None:
        """Writes one object."""
        line = json.dumps(json_values(value), ensure_ascii=False, allow_nan=False)
        self._console.out(line, highlight=False)

    def close(self) -> None:
        """Nothing is left to do."""


def _rolling(rolling: RollingCache | None) -> str:
    if rolling is None:
        return ""
    return (
        f", {bytes_text(rolling.saved_per_row)} less for {len(rolling.layers)} local layers that keep "
        f"{rolling.slots:,} tokens and take {rolling.chunk:,} at once"
    )


def bundle_table(manifest: Manifest) -> Table:
    """What a bundle is and what it costs, for people."""
    model, graph = manifest.model, manifest.graph
    heads = f"{model.num_query_heads} query, {model.num_kv_heads} KV heads of {model.head_dim}"
    total = model.parameters.embedding + model.parameters.other
    rows = {
        "model": f"{model.name}, {total / 1e6:,.1f} M parameters ({model.parameters.embedding / 1e6:,.1f} M "
        "embedding, shared with the head)",
        "shape": f"{model.num_layers} layers of {model.hidden_size}, {heads}, "
        f"vocabulary {model.vocab_size:,}",
        "precision": f"{manifest.precision} for {manifest.target}: stored {manifest.storage_dtype}, computed "
        f"{manifest.compute_dtype}, cache {manifest.cache_dtype}",
        "quantized": _quantized(manifest),
        "graph": f"opset {graph.opset}, cache of {graph.max_length:,} tokens, "
        f"logits of the {_logits(graph.logits)}",
        "on disk": bytes_text(sum(file.size for file in manifest.files.values())),
        "read per token": f"{bytes_text(manifest.bytes.per_token)} of weights",
        "cache per row": bytes_text(manifest.bytes.cache_per_row) + _rolling(graph.rolling),
        "kept in fp32": ", ".join(manifest.fp32_tensors) or "nothing beyond the norms",
        "checkpoint": f"{manifest.checkpoint.form}: {manifest.checkpoint.source or 'unknown'}",
        "parity": parity_line(manifest),
        "built by": f"{manifest.created_by} ({', '.join(f'{k} {v}' for k, v in manifest.tools.items())})",
    }
    if manifest.precision == "fp32":
        del rows["kept in fp32"]
    if manifest.quantization is None:
        del rows["quantized"]
    return _two_columns({name: text if name == "parity" else escape(text) for name, text in rows.items()})


def _quantized(manifest: Manifest) -> str:
    """How many tensors take which form, which keep 16 bits, and what they were calibrated on."""
    found = manifest.quantization
    if found is None:
        return ""
    ways = Counter(f"{tensor.form} by {tensor.operator}" for tensor in found.tensors.values())
    forms = ", ".join(f"{count} {way}" for way, count in ways.items())
    kept = f"; 16 bits for {', '.join(found.kept)}" if found.kept else ""
    text = "no text" if found.calibration is None else f"{found.tokens:,} tokens, {found.calibration}"
    return f"{manifest.scheme}: {forms}{kept}; calibrated on {text}"


def parity_table(report: ParityReport) -> Table:
    """What was measured, and the verdict, for people."""
    figures, colour = report.figures, "green" if report.verdict == "pass" else "red"
    diverged = len(report.divergences())
    rows = {
        "bundle": escape(report.subject),
        "reference": escape(report.reference),
        "verdict": f"[{colour}]{report.verdict}[/] ({report.level})",
        "because": escape("; ".join(report.reasons)),
        "tokens": f"{figures.tokens:,}",
        "largest error": f"{_brief(figures.max_absolute_error)}, "
        f"relative {_brief(figures.max_relative_error)}",
        "KL": f"mean {_brief(figures.mean_kl)}, largest {_brief(figures.max_kl)}",
        "same first choice": f"{figures.top1_agreement:.2%}",
        "perplexity": f"{_brief(figures.bundle_perplexity)}, "
        f"reference {_brief(figures.reference_perplexity)}",
        "KV cache": escape(cache_line(report)),
        "16 bits": escape(_kept(report)),
        "continuations": f"{len(report.continuations)}, of which {diverged} leave the reference's",
    }
    return _two_columns({name: text for name, text in rows.items() if text})


def _kept(report: ParityReport) -> str:
    """The layers that keep 16 bits and why, a line for each; nothing of a bundle that is not quantized."""
    found = report.quantized
    if found is None:
        return ""
    lines = [f"{name}: {why}" for name, why in found.kept.items()]
    rest = len(lines) - MOST_KEPT
    if rest > 0:
        lines[MOST_KEPT:] = [f"and {rest} more: parity.json names them"]
    return "\n".join(lines) or "no layer: all are quantized"


def _two_columns(rows: dict[str, str]) -> Table:
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in rows.items():
        table.add_row(name, text)
    return table


def parity_line(manifest: Manifest) -> str:
    """The verdict in a line, with markup."""
    parity = manifest.parity
    if parity.verdict == "not run":
        return "[yellow]not measured[/]"
    figures = parity.figures
    colour = "green" if parity.verdict == "pass" else "red"
    kept = ", kept all the same" if parity.allowed_failure else ""
    shown = {
        "largest error": _figure(figures, "max_relative_error", ".4g"),
        "KL": _figure(figures, "mean_kl", ".4g"),
        "same first choice": _figure(figures, "top1_agreement", ".2%"),
    }
    numbers = ", ".join(f"{name} {text}" for name, text in shown.items() if text)
    return f"[{colour}]{parity.verdict}[/] ({parity.level}{kept}): {numbers}"


def _figure(figures: Mapping[str, Any], name: str, form: str) -> str:
    """A figure as text; nothing where there is none, or no number."""
    value = figures.get(name)
    return format(value, form) if isinstance(value, int | float) else ""


def _logits(kind: str) -> str:
    return "last token" if kind == "last" else "every token"


def _worth(value: object) -> bool:
    return not isinstance(value, dict) and value is not None


def _brief(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int) and value > 10_000_000:
        return bytes_text(value)
    return f"{value:,}" if isinstance(value, int) else str(value)


def bytes_text(count: int) -> str:
    """A number of bytes with three digits or more and a unit."""
    if count < 1000:
        return f"{count} bytes"
    unit, size = unit_of(count)
    return f"{count / size:.2f} {unit}"


def unit_of(count: float) -> tuple[str, float]:
    """The unit that suits a number of bytes, and how many of them it is."""
    return next((unit for unit in _UNITS if count >= unit[1]), _UNITS[-1])
