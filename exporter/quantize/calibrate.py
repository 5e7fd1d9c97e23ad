"""What a quantized build needs before its graph is written: the scales, and which layers keep 16 bits.

    text → ScaleTable → Quantization → (a budget) → the layers that keep 16 bits

The table is made on text, read from a file (`--scales`), or follows from the weights (`--no-calibration`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from gemma_export.calibration.scales import (
    ScaleTable,
    codes_path,
    graph_digest,
    open_codes,
    require,
)
from gemma_export.calibration.sensitivity import choose
from gemma_export.disk import disk_errors
from gemma_export.exporter import events
from gemma_export.exporter.quantize.calibration_text import calibration_sequences
from gemma_export.exporter.quantize.collect import CODES_FILE, calibrate, quantization_of, uncalibrated
from gemma_export.exporter.quantize.sensitivity import apply_choice, measure_source
from gemma_export.exporter.request import BuildRequest
from gemma_export.exporter.source import Source, requested_source
from gemma_export.graphs.quantization import Quantization

SHARE = 0.85
"""Of a budget, that the choice may use up: what some texts cost is 15 % off what others do."""


@dataclass(frozen=True)
class QuantizationPlan:
    """How a model is quantized, and where that comes from.

    Attributes:
        table: The scales, with what was measured on the way.
        quantization: The same as graph passes take it.
        kept: Why each linear layer that keeps 16 bits does, by name.
    """

    table: ScaleTable
    quantization: Quantization
    kept: Mapping[str, str]


def plan_quantization(
    request: BuildRequest, source: Source, folder: Path, listener: events.Listener = events.ignore
) -> QuantizationPlan | None:
    """The plan of a build; None where its precision quantizes nothing.

    Args:
        request: What is built.
        source: The model.
        folder: Where codes that were chosen one by one are kept until the weights are written.
        listener: Told of progress.

    Raises:
        GemmaExportError: The text or the scales cannot be used, or no choice of layers keeps the budget.
    """
    if request.scheme.products is None:
        return None
    table, codes = _table(request, source, folder, listener)
    quantization = quantization_of(table, codes, request.target)
    if request.max_kl is None and request.max_perplexity_increase is None:
        return QuantizationPlan(table, quantization, {})
    report = measure_source(source, request, quantization, None, listener)
    choice = choose(
        report.units, request.max_kl, request.max_perplexity_increase, report.everything, share=SHARE
    )
    listener(events.Note(choice.reason))
    kept = {unit.name: unit.reason for unit in choice.kept}
    return QuantizationPlan(table, apply_choice(quantization, choice), kept)


def run(request: BuildRequest, output: Path, listener: events.Listener = events.ignore) -> ScaleTable:
    """The command `calibrate`: writes the table, and beside it the codes where there are some.

    Raises:
        GemmaExportError: It cannot be calibrated or written; nothing is left.
    """
    source = requested_source(request)
    with disk_errors(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as folder:
            table, codes = _table(request, source, Path(folder), listener)
            if codes is not None:
                codes.replace(codes_path(output))
            table.write(output)
    return table


def _table(
    request: BuildRequest, source: Source, folder: Path, listener: events.Listener
) -> tuple[ScaleTable, Path | None]:
    """The scales, and the file with their codes where there are some."""
    if request.scales is not None:
        table = ScaleTable.read(request.scales)
        checkpoint = source.checkpoint.digest()
        require(table, request.target, request.scheme.name, graph_digest(source.config), checkpoint)
        return table, open_codes(table, request.scales)
    if request.no_calibration:
        return uncalibrated(source, request.target, request.scheme, request.block), None
    sequences, text = calibration_sequences(source, request, listener)
    table = calibrate(
        source,
        request.target,
        request.scheme,
        sequences,
        block=request.block,
        text=text,
        observer=request.calibration.observer,
        codes_folder=folder,
        listener=listener,
    )
    return table, folder / CODES_FILE if table.codes is not None else None
