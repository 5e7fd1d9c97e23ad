"""A benchmark for people."""

import math
from collections.abc import Iterator

from rich.console import Group
from rich.markup import escape
from rich.table import Table

from gemma_export.exporter.bench.limits import bytes_per_token
from gemma_export.exporter.bench.report import Figure, Report, Spread
from gemma_export.exporter.bench.values import StepParts
from gemma_export.exporter.screen import bytes_text, unit_of


def bench_table(report: Report) -> Group:
    """What was measured: a line for each figure, a table for each peer, and notes to read them by."""
    tables = [_ours(report), *(_beside(report, peer) for peer in report.peers)]
    spaced = [part for table in tables for part in (table, "")]
    return Group(*spaced, *(escape(line) for line in notes(report)))


def _ours(report: Report) -> Table:
    table = _table("", "median (from, to)", "of the limit")
    for figure in report.figures():
        scale, unit = _scale(figure)
        table.add_row(f"{_name(figure)}, {unit}", _range(figure.ours, scale), _limit(figure))
    return table


def _beside(report: Report, peer: str) -> Table:
    table = _table(f"beside {peer}", "median (from, to)", "ratio (from, to)")
    for figure in report.figures():
        if (theirs := figure.peers.get(peer)) is not None:
            scale, unit = _scale(figure)
            ratio = _range(figure.ratios[peer])
            table.add_row(f"{_name(figure)}, {unit}", _range(theirs, scale), ratio)
    return table


def _table(*names: str) -> Table:
    table = Table(box=None, padding=(0, 3, 0, 0), header_style="dim")
    for name in names:
        table.add_column(escape(name), overflow="fold")
    return table


def notes(report: Report) -> Iterator[str]:
    """Sentences under the table."""
    plan, rounds = report.plan, report.rounds
    kernels = report.host.kernels or "onnxruntime's own"
    yield f"{report.host.processor}, {plan.threads} threads, {len(rounds)} rounds, kernels: {kernels}"
    if (read := report.machine("read")) is not None:
        rates = [f"reads {_range(read, 1e9)} GB/s by {' and '.join(sorted(_ways(report)))}"]
        if report.reading is not None:
            rates.append(f"{_range(report.reading, 1e9)} beside decoding")
        for name, what in (("integers", "int8"), ("floats", "fp32")):
            spread = report.machine(name)
            rates.append(
                f"{what} matrices {_range(spread, 1e9)} GOP/s"
                if spread is not None
                else f"{what} matrices not measured: the package onnx is not installed"
            )
        yield f"the machine: {', '.join(rates)}"
    else:
        yield "the machine's limits are not those of the device that runs this bundle"
    yield _bytes_read(report)
    load = max(round_.load_average for round_ in rounds)
    others = max(round_.others for round_ in rounds)
    yield f"others kept {others:.1f} cores busy at most; the load average was {load:.1f} at most"
    if report.step is not None:
        yield _step(report.step)
    if report.choosing is not None:
        yield f"choosing a token and making it text: {report.choosing:.1%} of decoding"
    for what in report.left_out:
        yield f"left out: {what}"


def _bytes_read(report: Report) -> str:
    depths = report.plan.depths or (0,)
    counts = [f"{bytes_text(round(bytes_per_token(report.manifest, n)))} at depth {n:,}" for n in depths]
    return f"read per token: {', '.join(counts)}"


def _step(step: StepParts) -> str:
    """The parts of a token's time, in milliseconds, under a profiler."""
    parts = {
        "weights": step.weights,
        "cache": step.cache,
        "other operators": step.others,
        "between operators": step.between,
        "around the graph": step.around,
        "choosing": step.choosing,
    }
    whole = sum(parts.values())
    listed = ", ".join(
        f"{name} {1e3 * seconds:.2f} ({seconds / whole:.1%})" for name, seconds in parts.items()
    )
    return (
        f"a token at depth {step.depth:,} under a profiler, ms: {listed}; "
        f"drawn with top-k and top-p instead of chosen: {1e3 * step.drawing:.2f}"
    )


def _name(figure: Figure) -> str:
    match figure.name:
        case "prefill":
            return f"prefill {figure.at:,}"
        case "decode":
            return f"decode at depth {figure.at:,}"
        case "first token":
            return f"first token of {figure.at:,}"
        case other:
            return other


def _scale(figure: Figure) -> tuple[float, str]:
    """What a figure is divided by, and the unit it then has."""
    if figure.unit != "bytes":
        return 1.0, figure.unit
    unit, size = unit_of(figure.ours.median)
    return size, unit


def _limit(figure: Figure) -> str:
    if figure.limit is None:
        return ""
    if figure.unit == "bytes":
        return f"{_digits(figure.limit.median)} times the bundle"
    return f"{figure.limit.median:.0%}"


def _range(spread: Spread, scale: float = 1.0) -> str:
    low, middle, high = (_digits(value / scale) for value in (spread.low, spread.median, spread.high))
    return f"{middle} ({low}, {high})"


def _digits(value: float) -> str:
    """Three digits that count, and all of those before the point."""
    places = 2 - math.floor(math.log10(abs(value))) if value else 0
    return f"{value:,.{max(places, 0)}f}"


def _ways(report: Report) -> set[str]:
    return {round_.machine.read_by for round_ in report.rounds if round_.machine is not None}
