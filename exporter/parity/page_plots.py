"""The plots of a parity report, as SVG that belongs into an HTML page.

Colours are names of the page's style sheet, so the plots follow its light and dark schemes; text is text, in
the page's font. matplotlib is imported when a plot is drawn.
"""

import io
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

from gemma_export.exporter.parity.page_figures import power_of_ten
from gemma_export.exporter.parity.report import ParityReport, Phase, PhaseErrors

# matplotlib wants colours that it can parse; each stands for a variable of the style sheet.
_COLOURS = {
    "#010101": "--ink",
    "#020202": "--muted",
    "#030303": "--line",
    "#040404": "--series-1",
    "#050505": "--series-2",
    "#060606": "--series-3",
    "#070707": "--fail",
}
_INK, _MUTED, _LINE, _FIRST, _SECOND, _THIRD, _BOUND = _COLOURS
_PHASE_STYLE: dict[Phase, tuple[str, str]] = {
    "prefill": (_FIRST, "o"),
    "decode": (_SECOND, "s"),
    "continuation": (_THIRD, "^"),
}


def error_by_position(report: ParityReport) -> str:
    """The largest absolute error of each position's logits, by way of running."""
    figure, axes = _axes("position", "largest |error| of a logit", width=9.6)
    for phase in report.phases:
        colour, marker = _PHASE_STYLE[phase.phase]
        positions, errors = _largest_at_each(phase)
        _points(axes, positions, errors, colour, marker, phase.phase)
    figures = report.figures
    if figures.max_relative_error > 0:
        largest_logit = figures.max_absolute_error / figures.max_relative_error
        _bound(axes, report.budget.max_relative_error * largest_logit, "bound")
    _finish(axes)
    return _svg(figure, "error", "Largest absolute error of the logits over positions")


def kl_by_position(report: ParityReport) -> str:
    """KL(reference ‖ bundle) at each position."""
    figure, axes = _axes("position", "KL divergence, nats")
    figures = report.figures
    _points(axes, figures.positions, figures.kl_by_position, _FIRST, "o", "mean at a position")
    _bound(axes, report.budget.mean_kl, "bound of the mean over all")
    _finish(axes)
    return _svg(figure, "kl", "KL divergence over positions")


def error_by_layer(report: ParityReport) -> str:
    """The relative error of the cached keys and values of each layer."""
    figure, axes = _axes("layer", "largest error / largest value")
    layers = [layer.layer for layer in report.layers]
    _points(axes, layers, [layer.key_max for layer in report.layers], _FIRST, "o", "keys", line=True)
    _points(axes, layers, [layer.value_max for layer in report.layers], _SECOND, "s", "values", line=True)
    _bound(axes, report.cache_bound, "bound")
    axes.xaxis.get_major_locator().set_params(integer=True)
    _finish(axes)
    return _svg(figure, "layers", "Relative error of cached keys and values by layer")


def _largest_at_each(phase: PhaseErrors) -> tuple[list[int], list[float]]:
    """One point per position: texts share positions, and a page should not hold thousands of points."""
    largest: dict[int, float] = {}
    for position, error in zip(phase.positions, phase.errors, strict=True):
        if math.isfinite(error):
            largest[position] = max(error, largest.get(position, 0.0))
    return list(largest), list(largest.values())


def _axes(x_label: str, y_label: str, width: float = 4.7) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, 2.9), layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.add_subplot()
    axes.patch.set_alpha(0)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(_LINE)
    axes.grid(visible=True, color=_LINE, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_MUTED, which="both", length=0, labelsize=9)
    axes.set_xlabel(x_label, color=_MUTED, fontsize=9.5)
    axes.set_ylabel(y_label, color=_MUTED, fontsize=9.5)
    return figure, axes


def _points(
    axes: Any,
    x: Sequence[int],
    y: Sequence[float],
    colour: str,
    marker: str,
    label: str,
    *,
    line: bool = False,
) -> None:
    """Points of a logarithmic axis: exact zeros will lie at its bottom; what is no number is left out."""
    finite = [(a, b) for a, b in zip(x, y, strict=True) if math.isfinite(b)]
    axes.plot(
        [a for a, _ in finite],
        [b for _, b in finite],
        linestyle="-" if line else "",
        linewidth=1.2,
        marker=marker,
        markersize=3.8,
        color=colour,
        markeredgewidth=0,
        alpha=0.85,
        label=label,
    )


def _bound(axes: Any, value: float, label: str) -> None:
    axes.axhline(value, color=_BOUND, linestyle="--", linewidth=1, label=label)


def _finish(axes: Any) -> None:
    """Sets the scale from what was drawn, and adds the legend."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    drawn = [value for line in axes.lines for value in line.get_ydata()]
    positive = [value for value in drawn if value > 0]
    if positive:
        low, high = _decades(positive)
        for line in axes.lines:
            line.set_ydata([max(value, low) for value in line.get_ydata()])
        axes.set_yscale("log")
        axes.set_ylim(low, high)
        axes.yaxis.set_major_locator(LogLocator(base=10, numticks=8))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _power(value)))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.tick_params(which="both", length=0)
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(0, 1),
        ncols=4,
        frameon=False,
        labelcolor=_INK,
        fontsize=9.5,
        handletextpad=0.4,
        borderaxespad=0.2,
        columnspacing=1.4,
    )


def _decades(values: Iterable[float]) -> tuple[float, float]:
    """Powers of ten around positive values."""
    logs = [math.log10(value) for value in values]
    return 10.0 ** math.floor(min(logs)), 10.0 ** (math.floor(max(logs)) + 1)


def _power(value: float) -> str:
    return power_of_ten(round(math.log10(value))) if value > 0 else "0"


def _svg(figure: Any, name: str, description: str) -> str:
    """The figure as an `<svg>` element whose ids no other plot of the page has."""
    from matplotlib import rc_context

    buffer = io.StringIO()
    style: Any = {"svg.fonttype": "none", "svg.hashsalt": name, "font.family": "sans-serif"}
    with rc_context(style):
        figure.savefig(
            buffer, format="svg", metadata={"Creator": None, "Date": None, "Format": None, "Type": None}
        )
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\s(xmlns(:xlink)?|version)="[^"]*"', "", svg).replace("xlink:href", "href")
    svg = re.sub(r'(id="|href="#|url\(#)', rf"\1{name}-", svg)
    # The page's style sheet has a say about fonts only where matplotlib has none.
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", svg)
    for colour, variable in _COLOURS.items():
        svg = svg.replace(colour, f"var({variable})")
    view = re.search(r'viewBox="[^"]*"', svg)
    assert view is not None
    opening = f'<svg {view.group()} role="img" aria-label="{description}">'
    return opening + svg[svg.index(">") + 1 :].strip()
