"""The section of a parity report that says what is stored in how many bits, and why in no fewer."""

import math
from html import escape

from gemma_export.exporter.parity.page_figures import number
from gemma_export.exporter.parity.page_parts import row_of_words, table_of_words
from gemma_export.exporter.parity.report import LayerErrors, ParityReport

_FORMS = {
    "w8a8-token": "8 bits, a scale per row; activations in 8 bits, a scale per token",
    "w8a8-tensor": "8 bits, a scale per row; activations in 8 bits, one scale from calibration",
    "w8": "8 bits",
    "w4": "4 bits, a scale per block",
    "float": "16 bits",
}


def quantized_section(report: ParityReport) -> str:
    """The section; nothing of a bundle that is not quantized."""
    found = report.quantized
    if found is None:
        return ""
    forms = [
        row_of_words(_FORMS.get(form, form), form, f"{count:,}")
        for form, count in sorted(found.forms.items())
    ]
    parts = [
        f"<h2>What is quantized</h2>\n<p>The scheme is {escape(found.scheme)}.</p>",
        table_of_words(("Weights", "Form", "How many"), forms),
    ]
    if found.kept:
        kept = [row_of_words(name, why) for name, why in found.kept.items()]
        parts.append(f"<h3>Kept in 16 bits</h3>\n{table_of_words(('Layer', 'Why'), kept)}")
    else:
        parts.append("<p>Every linear layer, the embedding table and the head are quantized.</p>")
    parts.append(f"<h3>KV cache</h3>\n<p>{escape(cache_line(report))}.</p>")
    return "\n".join(parts)


def cache_line(report: ParityReport) -> str:
    """The cache's format, and how far its keys and values are off."""
    found = report.quantized
    form = "" if found is None else found.cache
    if form == "int8":
        form = "int8, a scale for the keys and one for the values of each head and layer"
    if not report.layers:
        return form
    errors = f"{_worst(report.layers, 'key')}, {_worst(report.layers, 'value')}"
    return f"{form}: {errors}" if form else errors


def _worst(layers: tuple[LayerErrors, ...], what: str) -> str:
    def off(layer: LayerErrors) -> float:
        error: float = getattr(layer, f"{what}_max")
        return error

    layer = max(layers, key=lambda layer: math.inf if math.isnan(off(layer)) else off(layer))
    largest, mean = number(off(layer)), number(getattr(layer, f"{what}_rms"))
    return f"{what}s off by at most {largest} of the largest (layer {layer.layer}; in the mean {mean})"
