"""A benchmark as a picture: speeds by length and by depth, and how far the machine's limits are."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure as Picture

from gemma_export.exporter.bench.report import Figure, Report

_COLOURS = ("#3b6fb6", "#d9822b", "#4d9a5b", "#9a4d8f")
_LIMIT = "#555555"


def write_plot(report: Report, path: Path) -> None:
    """Writes a PNG.

    Raises:
        OSError: It cannot be written.
        ValueError: The name ends as no format that matplotlib knows does.
    """
    picture = Picture(figsize=(9.6, 4.2), layout="constrained")
    left, right = picture.subplots(1, 2)
    figures = report.figures()
    _bars(left, "decode", "tokens in the cache", [f for f in figures if f.name == "decode"], report.peers)
    _bars(right, "prefill", "tokens of the prompt", [f for f in figures if f.name == "prefill"], report.peers)
    manifest = report.manifest
    picture.suptitle(
        f"{manifest.model.name}, {manifest.precision} for {manifest.target}: {report.host.processor}, "
        f"{report.plan.threads} threads",
        fontsize=10,
    )
    picture.savefig(path, format="png", dpi=150)


def _bars(axes: Any, title: str, label: str, figures: Sequence[Figure], peers: Sequence[str]) -> None:
    """A group of bars for each figure: medians, with the spread as a line, and the limit as a dash."""
    names = ["this bundle", *peers]
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        offset = (i - (len(names) - 1) / 2) * width
        for x, figure in enumerate(figures):
            spread = figure.ours if i == 0 else figure.peers.get(name)
            if spread is None:
                continue
            error = [[spread.median - spread.low], [spread.high - spread.median]]
            shown = {"label": name} if x == 0 else {}
            colour = _COLOURS[i % len(_COLOURS)]
            axes.bar(x + offset, spread.median, 0.92 * width, color=colour, yerr=error, capsize=3, **shown)
    for x, figure in enumerate(figures):
        if figure.limit is not None:
            limit = figure.ours.median / figure.limit.median
            shown = {"label": "the machine's limit"} if x == 0 else {}
            axes.hlines(limit, x - 0.45, x + 0.45, colors=_LIMIT, linestyles="dashed", **shown)
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(label)
    axes.set_ylabel("tokens per second")
    axes.set_xticks(range(len(figures)), [f"{figure.at:,}" for figure in figures])
    axes.set_ylim(bottom=0)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if figures:
        axes.legend(frameon=False, fontsize=8.5)
