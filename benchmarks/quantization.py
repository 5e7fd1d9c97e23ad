"""What int8 and int4 bundles cost: in fidelity on the shipped models, in memory, time and bytes at 2B.

    python benchmarks/quantization.py                          the shipped model, every scheme
    python benchmarks/quantization.py --size tiny2             the one of Gemma 2's architecture
    python benchmarks/quantization.py --outliers               either with planted outlier channels
    python benchmarks/quantization.py --size 2b                bytes, peak memory and time of a 2B build
    python benchmarks/quantization.py --size 2b --calibration  and of a calibration on 128 × 512 tokens

Fidelity is measured on text that the model wrote itself, on the project's passages and, with `--text FILE`,
on a file; each scheme is built with calibration and with scales from the weights alone. A graph that
computes in 16 bits is run with each value rounded as a device rounds it. At 2B the weights are random, so
only the cost is measured; a calibration takes about an hour there on two cores.
"""

import argparse
import math
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from checkpoints import write_checkpoint
from comparison import (
    HEADINGS,
    PASSAGES,
    Comparison,
    cells,
    file_text,
    passages_text,
    print_heading,
    print_row,
    written_text,
)
from outliers import plant_outliers

from build import Run, measure
from gemma_export.calibration.text import builtin_texts
from gemma_export.errors import GemmaExportError
from gemma_export.exporter.config import SHIPPED, preset, tiny_folder
from gemma_export.exporter.parity.twin import measurable_session
from gemma_export.exporter.pipeline import build
from gemma_export.exporter.quantize.collect import uncalibrated
from gemma_export.exporter.request import SCHEMES, BuildRequest
from gemma_export.exporter.source import open_source
from gemma_export.runtime.parity import ParityFigures
from gemma_export.runtime.session import load

GEMMA_EXPORT = [sys.executable, "-m", "gemma_export"]
CALIBRATION_SAMPLES, CALIBRATION_LENGTH = 128, 512
LONGEST_PIECE = 16
"""Bytes that the longest usual piece of a tokenizer stands for."""

COSTS = {
    "int8": ("--precision", "int8"),
    "int4": ("--precision", "int4", "--block", "128"),
}
"""What is built at 2B."""
BYTES_PER_PARAMETER = {"int8": 1.01, "int4": 0.66}
"""The most that the whole bundle may have."""


@dataclass(frozen=True)
class Bounds:
    """What an int8 scheme may cost on a text; where a bound is None, none is set."""

    mean_kl: float
    perplexity_change: float | None
    top1_agreement: float

    def hold(self, text: str, figures: ParityFigures) -> bool:
        """Whether the figures on a text are within."""
        change = None if text in UNPREDICTED else figures.perplexity_change
        return (
            figures.mean_kl <= self.mean_kl
            and figures.top1_agreement >= self.top1_agreement
            and (self.perplexity_change is None or change is None or abs(change) <= self.perplexity_change)
        )


INT8 = Bounds(5e-4, 1e-3, 0.985)
INT8_OUTLIERS = Bounds(1e-3, None, 0.975)
# The shipped model has not learned what most passages are about. The likelihood of a token that it takes for
# impossible moves far at the smallest error, either way: their perplexity says nothing about rounding.
UNPREDICTED = {PASSAGES}
SCALES = ("to nearest", "least squares", "calibrated")
"""How scales are found: so that nothing is clipped; as `--no-calibration` does; on text."""
INT4_OF_NEAREST = 0.6
"""The largest share of the KL of rounding to nearest, at the same block size, that int4 may keep."""


@dataclass(frozen=True)
class Variant:
    """A scheme and the block size that it is measured with; None is its default."""

    target: str
    precision: str
    scheme: str
    block: int | None

    @property
    def name(self) -> str:
        """For a table."""
        size = "" if self.block is None else f", blocks of {self.block}"
        return f"{self.target} {self.precision} {self.scheme}{size}"


def variants() -> Iterator[Variant]:
    """Every scheme that quantizes: int8 with its default block size, int4 with each."""
    for (target, precision), schemes in SCHEMES.items():
        for scheme in schemes:
            if scheme.products is not None:
                blocks: list[int | None] = [None]
                if precision == "int4":
                    blocks = [*sorted(block for block in scheme.products.blocks if block is not None)]
                yield from (Variant(target, precision, scheme.name, block) for block in blocks)


def measure_fidelity(size: str, text: Path | None, only: str, *, outliers: bool) -> None:
    """Builds every variant of a shipped model, without calibration and with it, and prints a table.

    Args:
        size: Which shipped model.
        text: A file to measure on as well.
        only: Part of the names of the variants that are wanted.
        outliers: Whether the checkpoint gets outlier channels.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        checkpoint = tiny_folder(size)
        if outliers:
            checkpoint = plant_outliers(checkpoint, folder / "checkpoint")
        bounds = INT8_OUTLIERS if outliers else INT8
        build(BuildRequest(output=folder / "fp32", checkpoint=checkpoint, logits="all", parity="none"))
        session = load(folder / "fp32", threads=1)
        texts = [written_text(session), passages_text(session.tokenizer, session.max_length)]
        if text is not None:
            texts.append(file_text(session.tokenizer, text, session.max_length))
        comparison = Comparison(open_source(checkpoint), texts)
        print_heading("bundle", "scales", "MB", *HEADINGS, "KL / to nearest", "within bounds")
        for variant in variants():
            if only not in variant.name:
                continue
            nearest: dict[str, float] = {}
            for way in SCALES:
                if way == "least squares" and variant.precision == "int8":
                    continue  # What the weights alone give 8 bits is rounding to nearest.
                try:
                    bundle = build(_request(variant, checkpoint, folder, way)).path
                except GemmaExportError as error:
                    print_row(variant.name, way, str(error))
                    continue
                stored = sum((bundle / name).stat().st_size for name in ("model.onnx", "model.onnx.data"))
                for name, figures in comparison.figures(measurable_session(bundle)):
                    share, within = "", ""
                    if way == "to nearest":
                        nearest[name] = figures.mean_kl
                    elif name in nearest:
                        share = f"{figures.mean_kl / nearest[name]:.2f}"
                    if way == "calibrated":
                        holds = figures.mean_kl <= INT4_OF_NEAREST * nearest.get(name, math.nan)
                        if variant.precision == "int8":
                            holds = bounds.hold(name, figures)
                        within = "yes" if holds else "no"
                    megabytes = f"{stored / 1e6:.2f}"
                    print_row(variant.name, way, megabytes, *cells(name, figures), share, within)


def _request(variant: Variant, checkpoint: Path, folder: Path, way: str) -> BuildRequest:
    request = BuildRequest(
        output=folder / "bundle",
        checkpoint=checkpoint,
        target=variant.target,
        precision=variant.precision,
        scheme_name=variant.scheme,
        block=variant.block,
        logits="all",
        parity="none",
        force=True,
    )
    if way == "calibrated":
        return request
    if way == "least squares" or variant.precision == "int8":
        return replace(request, no_calibration=True)
    # What nobody would build, and what everything is held against: scales with which nothing is clipped.
    table = uncalibrated(open_source(checkpoint), request.target, request.scheme, request.block)
    linears = {name: replace(linear, method="nearest") for name, linear in table.linears.items()}
    scales = folder / "nearest.json"
    replace(table, linears=linears).write(scales)
    return replace(request, block=None, scales=scales)


def measure_cost(size: str, folder: Path, *, calibration: bool) -> None:
    """Builds from a checkpoint of random weights, each in a process of its own, and prints a table."""
    config = preset(size)
    parameters = config.embedding_parameters + config.other_parameters
    checkpoint, bundle = folder / "checkpoint", folder / "bundle"
    write_checkpoint(config, checkpoint)
    print_heading("command", "bytes / parameter", "at most", "time", "peak RSS")
    for precision, options in COSTS.items():
        command = [*GEMMA_EXPORT, "build", "--quiet", "--force", "--parity", "none", "--no-calibration"]
        run = measure([*command, "--checkpoint", str(checkpoint), *options, "-o", str(bundle)])
        written = sum(file.stat().st_size for file in bundle.iterdir()) / parameters
        wanted = f"{BYTES_PER_PARAMETER[precision]}"
        print_row(f"build {' '.join(options)}", f"{written:.4f}", wanted, *_cost(run))
    if calibration:
        text = folder / "text.txt"
        _write_text(text)
        options = (
            "--calibration-samples",
            f"{CALIBRATION_SAMPLES}",
            "--calibration-length",
            f"{CALIBRATION_LENGTH}",
        )
        command = [*GEMMA_EXPORT, "calibrate", "--quiet", "--precision", "int8", *options]
        command += ["--calibration-data", str(text), "--checkpoint", str(checkpoint)]
        run = measure([*command, "-o", str(folder / "scales.json")])
        print_row(f"calibrate --precision int8 {' '.join(options)}", "", "", *_cost(run))


def _cost(run: Run) -> tuple[str, str]:
    return f"{run.seconds:.0f} s", f"{run.peak / 2**30:.2f} GiB"


def _write_text(path: Path) -> None:
    """Enough text for a calibration, of the project's own passages: each paragraph is a whole sample."""
    passages = [" ".join(passage.text.split()) for passage in builtin_texts()]
    paragraphs = []
    for i in range(CALIBRATION_SAMPLES):
        turned = " ".join(passages[i % len(passages) :] + passages[: i % len(passages)])
        repeats = -(-CALIBRATION_LENGTH * LONGEST_PIECE // len(turned))
        paragraphs.append(" ".join([turned] * repeats))
    path.write_text("\n\n".join(paragraphs), encoding="utf-8")


def main() -> None:
    """Measures what the arguments name."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=[*SHIPPED, "2b", "7b"], default="tiny")
    parser.add_argument(
        "--outliers", action="store_true", help="a shipped model: with planted outlier channels"
    )
    parser.add_argument("--text", type=Path, help="a shipped model: a text file to measure on as well")
    parser.add_argument("--only", default="", help="a shipped model: bundles whose name has this in it")
    parser.add_argument("--calibration", action="store_true", help="2b, 7b: measure a calibration too")
    parser.add_argument(
        "--folder", type=Path, default=None, help="2b, 7b: where to build; by default a temporary folder"
    )
    arguments = parser.parse_args()
    if arguments.size in SHIPPED:
        measure_fidelity(arguments.size, arguments.text, arguments.only, outliers=arguments.outliers)
    else:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            measure_cost(arguments.size, Path(folder), calibration=arguments.calibration)


if __name__ == "__main__":
    main()
