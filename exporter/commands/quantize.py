"""The commands about 8 and 4 bits that build no bundle."""

import json
from collections.abc import Iterator
from pathlib import Path
from shlex import quote
from typing import Annotated

import typer
from rich.markup import escape

from gemma_export.disk import disk_errors
from gemma_export.errors import UsageError
from gemma_export.exporter.commands import options
from gemma_export.exporter.commands import request_options as groups
from gemma_export.exporter.commands.console import check_new_file, listening, show_result, write_json
from gemma_export.exporter.process import out
from gemma_export.exporter.request import BuildRequest


@groups.takes_request(groups.model, groups.quantized_precision, groups.calibration, groups.cache)
def calibrate(
    request: BuildRequest,
    output: Annotated[Path, typer.Option("-o", "--output", help="The file to write.")] = Path("scales.json"),
    force: Annotated[bool, typer.Option("--force", help="Replace an older file.")] = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Find the scales of a quantized build, and keep them in a file for `build --scales`."""
    if not request.calibrated:
        raise UsageError(
            f"{request.precision} has nothing to calibrate.", "Add --precision int8 or --precision int4."
        )
    check_new_file(output, "scales.json", force=force)
    with listening(as_json=as_json, quiet=quiet) as listener:
        from gemma_export.exporter.quantize.calibrate import run as run_calibration

        run_calibration(request, output, listener)
    if as_json:
        write_json({"event": "result", "scales": str(output)})
    elif not quiet:
        line = " ".join(["gemma-export build", *_as_typed(request), "--scales", quote(str(output))])
        show_result(output, steps=(line,))


@groups.takes_request(
    groups.model, groups.quantized_precision, groups.calibration, groups.instead_of_calibration
)
def sensitivity(
    request: BuildRequest,
    text: options.Text = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="A file for the report, as JSON.")
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Measure what each layer costs when it alone is quantized."""
    if not request.calibrated:
        raise UsageError(
            f"{request.precision} quantizes nothing.", "Add --precision int8 or --precision int4."
        )
    if output is not None:
        check_new_file(output, "report.json", force=True)
    with listening(as_json=as_json, quiet=False) as listener:
        from gemma_export.exporter.quantize.sensitivity import measure_sensitivity
        from gemma_export.exporter.quantize.sensitivity_table import sensitivity_table

        report = measure_sensitivity(request, text, listener)
    values = report.to_json()
    if output is not None:
        with disk_errors(output):
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_text(json.dumps(values, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    if as_json:
        write_json({"event": "result", **values})
    else:
        out.print(sensitivity_table(report))
        if output is not None:
            out.print(f"\n{escape(str(output))} is written.", highlight=False)


def _as_typed(request: BuildRequest) -> Iterator[str]:
    """The options that name a model and how it is quantized, as one can paste them into a shell."""
    if request.size is not None:
        yield f"--size {request.size}"
    for option, path in (("--checkpoint", request.checkpoint), ("--tokenizer", request.tokenizer)):
        if path is not None:
            yield f"{option} {quote(str(path))}"
    if request.random_weights:
        yield "--random-weights" if request.seed is None else f"--random-weights --seed {request.seed}"
    yield f"--precision {request.precision} --target {request.target}"
    if request.scheme_name is not None:
        yield f"--scheme {request.scheme_name}"
    if request.kv_cache != "float":
        yield f"--kv-cache {request.kv_cache}"
