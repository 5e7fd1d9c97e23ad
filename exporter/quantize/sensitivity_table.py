"""What each layer costs, as a table for people; and which of them keep 16 bits."""

import math

from rich.markup import escape
from rich.table import Table

from gemma_export.calibration.sensitivity import Choice, SensitivityReport, UnitCost

_UNITS = (("GB", 1e9), ("MB", 1e6), ("kB", 1e3))


def sensitivity_table(report: SensitivityReport, choice: Choice | None = None) -> Table:
    """Every unit, the most expensive first, and everything at the end.

    Args:
        report: What was measured.
        choice: Which of the units keep 16 bits; None where nothing was chosen.
    """
    title = f"{report.model}, {report.precision} for {report.target} ({report.scheme})"
    caption = (
        f"{report.tokens:,} tokens of {report.text}; perplexity of the checkpoint "
        f"{report.reference_perplexity:.4g}; sum of the KLs {report.sum_of_kl:.3g}"
    )
    if choice is not None:
        caption = f"{caption}\n{choice.reason}"
    table = Table(box=None, padding=(0, 2, 0, 0), title=escape(title), caption=escape(caption))
    table.title_justify = table.caption_justify = "left"
    table.add_column("quantized alone", no_wrap=True)
    table.add_column("form", no_wrap=True)
    for name in ("saves", "KL", "perplexity", "top-1"):
        table.add_column(name, justify="right", no_wrap=True)
    kept = () if choice is None else choice.names
    # What is no number costs more than any number.
    for unit in sorted(report.units, key=lambda unit: -unit.kl if math.isfinite(unit.kl) else -math.inf):
        table.add_row(*_cells(unit, "[yellow]16 bits[/]" if unit.name in kept else unit.form))
    table.add_section()
    table.add_row(*_cells(report.everything, ""), style="bold")
    return table


def _cells(unit: UnitCost, form: str) -> list[str]:
    return [
        escape(unit.name),
        form,
        _bytes(unit.saved_bytes),
        f"{unit.kl:.2e}",
        f"{unit.perplexity_change:+.3%}",
        f"{unit.top1_agreement:.2%}",
    ]


def _bytes(count: int) -> str:
    """Three digits and a unit."""
    name, size = next((unit for unit in _UNITS if abs(count) >= unit[1]), ("B", 1))
    return f"{count / size:.3g} {name}"
