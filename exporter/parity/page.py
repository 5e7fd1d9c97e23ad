"""Writes a parity report: `parity.json` for programs and `parity.html`, one page that needs nothing else.

The page has no script and asks for nothing over a network; its own policy forbids both. Everything that comes
from a model, a text or a path is escaped. Without matplotlib it has its tables and says what the plots need.
"""

import json
from collections.abc import Callable
from html import escape
from pathlib import Path

from rich.table import Table
from rich.text import Text

from gemma_export.exporter.parity import page_plots
from gemma_export.exporter.parity.page_figures import number, shown_figures
from gemma_export.exporter.parity.page_limits import limits
from gemma_export.exporter.parity.page_parts import row, table
from gemma_export.exporter.parity.page_quantized import quantized_section
from gemma_export.exporter.parity.page_style import STYLE
from gemma_export.exporter.parity.report import (
    Continuation,
    MeasuredText,
    ParityReport,
    PhaseErrors,
    largest,
)

JSON_FILE = "parity.json"
HTML_FILE = "parity.html"

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
_PHASES = {
    "prefill": "Prefill, in steps of several tokens",
    "decode": "Decode, a text's tokens one by one",
    "continuation": "The bundle's own continuations",
}


def write_report(report: ParityReport, folder: Path | str) -> tuple[Path, Path]:
    """Writes both files into an existing folder.

    Returns:
        The paths of the JSON and of the page.

    Raises:
        OSError: They cannot be written.
    """
    json_path, html_path = Path(folder) / JSON_FILE, Path(folder) / HTML_FILE
    text = json.dumps(report.to_json(), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    # A path may hold halves of surrogate pairs, which UTF-8 has not; their escapes are valid JSON.
    json_path.write_bytes(text.encode("utf-8", "backslashreplace"))
    html_path.write_bytes(render_html(report).encode("utf-8", "backslashreplace"))
    return json_path, html_path


def report_table(report: ParityReport) -> Table:
    """The verdict, the figures and the reasons, for a terminal."""
    good = report.verdict == "pass"
    table = Table(
        title=Text(f"{report.subject}: {report.verdict}", style="bold green" if good else "bold red"),
        caption=Text("\n".join(report.reasons)) if report.reasons else None,
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("figure")
    table.add_column("measured", justify="right")
    table.add_column("budget", justify="right")
    for figure in shown_figures(report):
        style = "red" if figure.within is False else ""
        table.add_row(Text(figure.name), Text(figure.measured, style=style), Text(figure.bound))
    return table


def render_html(report: ParityReport) -> str:
    """The whole page."""
    body = [
        _head(report),
        _figures(report),
        quantized_section(report),
        _plots(report),
        _phases(report),
        _continuations(report),
        _texts(report),
        _limits(report),
        _made_with(report),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Parity of {escape(report.subject)}</title>\n<style>{STYLE}</style>\n</head>\n"
        "<body>\n<main>\n" + "\n".join(body) + "\n</main>\n</body>\n</html>\n"
    )


def _head(report: ParityReport) -> str:
    figures = report.figures
    if report.verdict == "pass":
        banner = f"<strong>Pass.</strong><p>Within the {escape(report.precision)} budget in every figure.</p>"
    else:
        reasons = "".join(f"<li>{escape(reason)}</li>" for reason in report.reasons)
        banner = (
            f"<strong>Fail.</strong><p>Outside the {escape(report.precision)} budget:</p><ul>{reasons}</ul>"
        )
    facts = {
        "Reference": report.reference,
        "Level": f"{report.level}: {figures.tokens:,} positions compared in {len(report.texts)} texts and "
        f"{len(report.continuations)} continuations",
        "Cache": f"{report.max_length:,} slots, measured up to {max(figures.positions, default=0) + 1:,}",
        "Logits": "of every token" if report.logits == "all" else "of the last token of each step",
    }
    items = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(fact)}</dd></div>" for name, fact in facts.items()
    )
    return (
        f'<h1>Parity report</h1>\n<div class="subject">{escape(report.subject)}</div>\n'
        f'<div class="verdict {report.verdict}">{banner}</div>\n<dl class="facts">{items}</dl>'
    )


def _figures(report: ParityReport) -> str:
    rows = [
        row(figure.name, figure.measured, figure.bound, _judgement(figure.within))
        for figure in shown_figures(report)
    ]
    return (
        f"<h2>Figures against the budget</h2>\n{table(('Figure', 'Measured', 'Budget', ''), rows)}\n"
        f'<p class="note">{escape(report.budget.reason)} The bound on the most likely token allows for '
        "the chance in so few positions.</p>"
    )


def _plots(report: ParityReport) -> str:
    plots: list[tuple[str, Callable[[ParityReport], str]]] = [
        ("Error of the logits over positions", page_plots.error_by_position),
        ("KL divergence over positions", page_plots.kl_by_position),
        ("Error of cached keys and values by layer", page_plots.error_by_layer),
    ]
    try:
        drawn = "".join(
            f"<figure><figcaption>{caption}</figcaption>{draw(report)}</figure>" for caption, draw in plots
        )
    except ImportError:
        return (
            '<h2>Plots</h2>\n<p class="note">The plots need matplotlib: '
            "<code>pip install &quot;gemma-export[parity]&quot;</code>, then measure again with "
            "<code>gemma-export parity</code>.</p>"
        )
    return f'<h2>Plots</h2>\n<div class="plots">{drawn}</div>'


def _phases(report: ParityReport) -> str:
    def phase_row(phase: PhaseErrors) -> str:
        count = len(phase.positions)
        worst = largest(phase.errors)
        return row(_PHASES[phase.phase], str(count), number(worst), f"{phase.agreements / count:.2%}")

    header = ("Way of running", "Positions", "Largest error", "Same next token")
    return f"<h2>By way of running</h2>\n{table(header, [phase_row(phase) for phase in report.phases])}"


def _continuations(report: ParityReport) -> str:
    samples = "\n".join(_continuation(continuation) for continuation in report.continuations)
    return (
        "<h2>Greedy continuations</h2>\n<p>The bundle continued these prompts, and the reference checked "
        "every token: up to a marked one, the text is what the reference would have written too.</p>\n"
        + samples
    )


def _continuation(continuation: Continuation) -> str:
    count, found = len(continuation.tokens), continuation.divergence
    if found is None:
        outcome = f'<span class="ok">the same for all {count} tokens</span>'
    else:
        kind = "a near tie" if found.near_tie else "not a tie"
        outcome = (
            f'<span class="{"ok" if found.near_tie else "bad"}">parts at token {found.index + 1} of {count}: '
            f"{kind}, margin {number(found.margin)}, error there {number(found.error)}</span>"
        )
    text = continuation.text
    if text is None:
        words = " ".join(map(str, continuation.tokens))
        shown = f'<span class="prompt">{" ".join(map(str, continuation.prompt_tokens))}</span> {words}'
    else:
        shown = f'<span class="prompt">{escape(text.prompt)}</span>{escape(text.agreed)}'
        if found is not None:
            shown += f'<mark>{_token(text.bundle, found.bundle_token)}</mark><span class="rest">'
            shown += f"{escape(text.rest)}</span>"
    instead = ""
    if found is not None:
        said = _token(text.reference if text else "", found.reference_token)
        instead = f'<p class="note">The reference says <mark>{said}</mark> instead.</p>'
    return (
        f'<div class="sample"><header><b>{escape(continuation.name)}</b>{outcome}</header>'
        f'<p class="text">{shown}</p>{instead}</div>'
    )


def _texts(report: ParityReport) -> str:
    def details(text: MeasuredText) -> str:
        decoded = text.tokens - sum(text.chunks)
        counts = f"{text.tokens:,} tokens, {text.measured:,} compared"
        shown = escape(text.text) if text.text is not None else ""
        steps = f"Steps of {', '.join(map(str, text.chunks))} tokens, then {decoded} of one."
        return (
            f'<details><summary><span>{escape(text.name)}</span><span class="note">{counts}</span></summary>'
            f'<p class="text">{shown}</p><p class="note">{steps}</p></details>'
        )

    return "<h2>Measured on</h2>\n" + "\n".join(details(text) for text in report.texts)


def _limits(report: ParityReport) -> str:
    items = "".join(f"<li>{escape(limit)}</li>" for limit in limits(report))
    return f"<h2>What this does not see</h2>\n<ul>{items}</ul>"


def _made_with(report: ParityReport) -> str:
    cost = report.cost
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    return (
        "<h2>Made with</h2>\n"
        f'<p class="note">{escape(versions)}. The bundle ran {cost.bundle_tokens:,} tokens in '
        f"{cost.bundle_steps:,} steps and {cost.bundle_seconds:.1f} s, the reference "
        f"{cost.reference_tokens:,} tokens in {cost.reference_seconds:.1f} s. "
        f"The same figures for programs are in {JSON_FILE}.</p>"
    )


def _token(text: str, token: int) -> str:
    """One token so that it can be seen, blanks and line breaks too."""
    visible = text.replace("\n", "↵").replace("\t", "⇥")
    if not visible.strip():
        visible = visible.replace(" ", "␣") or f"token {token}"
    return escape(visible)


def _judgement(within: bool | None) -> str:
    if within is None:
        return ""
    return '<span class="ok">✓ within</span>' if within else '<span class="bad">✗ outside</span>'
