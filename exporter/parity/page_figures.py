"""The figures of a parity report beside their bounds, as people read them on the page or in a terminal."""

import math
import re
from dataclasses import dataclass

from gemma_export.exporter.parity.report import ParityReport, largest

_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class ShownFigure:
    """A figure in words; one without a budget has no bound and is not judged."""

    name: str
    measured: str
    bound: str = ""
    within: bool | None = None


def shown_figures(report: ParityReport) -> list[ShownFigure]:
    """All figures, those with a bound first."""
    figures, budget = report.figures, report.budget
    change = figures.perplexity_change
    upper = [
        ("Largest error of a logit / largest logit", figures.max_relative_error, budget.max_relative_error),
        ("Mean KL(reference ‖ bundle), nats", figures.mean_kl, budget.mean_kl),
        ("Largest KL, nats", figures.max_kl, budget.max_kl),
    ]
    if change is not None:
        upper.append(("Change of perplexity", abs(change), budget.perplexity_change))
    key = largest(layer.key_max for layer in report.layers)
    value = largest(layer.value_max for layer in report.layers)
    upper.append(("Largest error of a cached key / largest key", key, report.cache_bound))
    upper.append(("Largest error of a cached value / largest value", value, report.cache_bound))
    shown = [
        ShownFigure(name, number(found), f"≤ {number(bound)}", found <= bound) for name, found, bound in upper
    ]
    agreement, broken = figures.top1_agreement, figures.non_finite_bundle + figures.non_finite_reference
    shown.append(
        ShownFigure(
            "Same most likely next token",
            f"{agreement:.2%}",
            f"≥ {budget.top1_agreement:.2%}",
            agreement >= budget.top1_agreement,
        )
    )
    shown.append(ShownFigure("Positions with a NaN or an infinity", str(broken), "0", not broken))
    shown.append(ShownFigure("Largest absolute error of a logit", number(figures.max_absolute_error)))
    shown.append(ShownFigure("Mean absolute error of a logit", number(figures.mean_absolute_error)))
    if figures.reference_perplexity is not None and figures.bundle_perplexity is not None:
        both = f"{figures.reference_perplexity:,.2f} / {figures.bundle_perplexity:,.2f}"
        shown.append(ShownFigure("Perplexity on the texts, reference / bundle", both))
    return shown


def number(value: float) -> str:
    """Three digits, as people write them."""
    if math.isnan(value):
        return "not a number"
    if math.isinf(value):
        return "infinite"
    text = f"{value:.3g}"
    found = re.fullmatch(r"(.+)e([+-]\d+)", text)
    return f"{found[1]} · {power_of_ten(int(found[2]))}" if found else text


def power_of_ten(exponent: int) -> str:
    """10 with its exponent raised."""
    return "10" + str(exponent).translate(_SUPERSCRIPTS)
