"""The command that measures what a bundle costs to run."""

from pathlib import Path
from typing import Annotated

import typer

from gemma_export.disk import disk_errors
from gemma_export.errors import GemmaExportError, UsageError
from gemma_export.exporter.commands import options
from gemma_export.exporter.commands.console import listening, write_json
from gemma_export.exporter.process import out

_PROMPTS = "128,512,2048"
_DEPTHS = "0,512,2048,full"


def bench(
    bundle: options.Bundle,
    prompts: Annotated[str, typer.Option(help="Lengths of the prompts that are read.")] = _PROMPTS,
    depths: Annotated[str, typer.Option(help="Tokens in the cache when decoding begins.")] = _DEPTHS,
    tokens: Annotated[int, typer.Option(help="How many are decoded at each depth.")] = 32,
    repeats: Annotated[int, typer.Option(help="How many times all of it is measured.")] = 5,
    threads: options.Threads = None,
    compare: Annotated[
        list[str] | None,
        typer.Option(
            metavar="genai|MODEL.gguf|CHECKPOINT",
            help="In turns with onnxruntime-genai on this bundle, with llama-bench, or with transformers in "
            "bfloat16 on a checkpoint; may be repeated.",
        ),
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="A PNG file for a plot.")] = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Measure how fast a bundle runs here, and how fast the machine would let it."""
    from gemma_export.exporter.bench import plan, rounds
    from gemma_export.exporter.bench.report import Report, this_host
    from gemma_export.exporter.bench.table import bench_table
    from gemma_export.runtime.bundle import open_bundle

    if repeats < 1:
        raise UsageError(f"It is to be measured {repeats} times.", "Give at least 1 with --repeats.")
    opened = open_bundle(bundle, check="quick")
    settled, left_out = plan.make_plan(
        opened.manifest.graph.max_length,
        prompts=_numbers(prompts, "--prompts"),
        depths=["full" if text == "full" else _number(text, "--depths") for text in _split(depths)],
        tokens=tokens,
        threads=threads,
    )
    peers = rounds.peers_of(opened, compare or [])
    if plot is not None:
        # What is missing is missed now, not when all is measured.
        from gemma_export.exporter.bench.plot import write_plot
    measured: list[rounds.Round] = []
    ended_by: BaseException | None = None
    with listening(as_json=as_json, quiet=quiet) as listener:
        try:
            # One by one: whatever ends it, those that were finished are in.
            measured.extend(rounds.run_rounds(opened, settled, peers, repeats, listener))
            step = rounds.measure_step(opened, settled) if rounds.runs_on_cpu(opened) else None
        except (GemmaExportError, KeyboardInterrupt, SystemExit) as error:
            if not measured:
                raise
            # What has been measured took minutes: it is told before why there is no more of it.
            ended_by, step = error, None
        report = Report(opened.path, opened.manifest, this_host(), settled, left_out, tuple(measured), step)
    if plot is not None:
        with disk_errors(plot):
            write_plot(report, plot)
    if as_json:
        write_json({"event": "result", **report.to_json()})
    elif not quiet:
        out.print(bench_table(report))
    if ended_by is not None:
        raise ended_by


def _numbers(text: str, option: str) -> list[int]:
    return [_number(part, option) for part in _split(text)]


def _split(text: str) -> list[str]:
    return [part for part in (part.strip() for part in text.split(",")) if part]


def _number(text: str, option: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise UsageError(
            f"{option} has {text!r}, which is no number.", f"Give numbers with commas: {option} 0,512."
        ) from None
