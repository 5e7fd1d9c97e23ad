"""The command `gemma-export`: what is typed becomes a request, and events become a screen.

What only some commands need is imported by those: `--help`, `inspect` and `generate` work without torch.
"""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from shlex import quote
from typing import Annotated, Any, Literal

import typer
from rich.markup import escape

from gemma_export.errors import PromptError, UsageError
from gemma_export.exporter import cli_options as options
from gemma_export.exporter import events
from gemma_export.exporter.process import err, out, run, show_error
from gemma_export.exporter.request import BuildRequest, CalibrationRequest, ParityLevel
from gemma_export.exporter.screen import JsonLines, Screen, bundle_table, parity_table
from gemma_export.runtime.bundle import Manifest
from gemma_export.runtime.manifest import LogitsKind
from gemma_export.version import __version__

app = typer.Typer(
    name="gemma-export",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode="rich",
    help="Turn a Gemma checkpoint into a bundle that runs on a device, and prove that it says the same.",
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.command()
def build(
    size: options.Size = None,
    checkpoint: options.Checkpoint = None,
    random_weights: options.RandomWeights = False,
    seed: options.WeightsSeed = None,
    precision: options.Precision = "fp32",
    target: options.Target = "cpu",
    scheme: options.Scheme = None,
    block: options.Block = None,
    calibration_data: options.CalibrationData = None,
    calibration_samples: options.CalibrationSamples = None,
    calibration_length: options.CalibrationLength = None,
    calibration_seed: options.CalibrationSeed = None,
    observer: options.Observer = "mse",
    scales: options.Scales = None,
    no_calibration: options.NoCalibration = False,
    kv_cache: options.Cache = "float",
    max_kl: Annotated[
        float | None, typer.Option(help="Keep layers in 16 bits, so that the mean KL is at most this.")
    ] = None,
    max_perplexity_increase: Annotated[
        float | None, typer.Option(help="Likewise for the perplexity, in percent.")
    ] = None,
    max_length: Annotated[
        int | None, typer.Option(help="Tokens of prompt and answer together; by default the model's context.")
    ] = None,
    logits: Annotated[
        LogitsKind, typer.Option(help="Of the last token, or of all (for perplexity).")
    ] = "last",
    parity: Annotated[
        ParityLevel, typer.Option(help="How much to measure against the checkpoint.")
    ] = "quick",
    allow_parity_failure: Annotated[
        bool, typer.Option("--allow-parity-failure", help="Keep a bundle that is outside its budget.")
    ] = False,
    tokenizer: options.Tokenizer = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Folder of the bundle.")] = None,
    force: options.Force = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Export a checkpoint to a bundle, and check that it says what the checkpoint says."""
    request = BuildRequest(
        output=output,
        size=size,
        checkpoint=checkpoint,
        random_weights=random_weights,
        seed=seed,
        precision=precision,
        target=target,
        scheme_name=scheme,
        block=block,
        calibration=CalibrationRequest(
            calibration_data, calibration_samples, calibration_length, calibration_seed, observer
        ),
        scales=scales,
        no_calibration=no_calibration,
        kv_cache=kv_cache,
        max_kl=max_kl,
        max_perplexity_increase=max_perplexity_increase,
        max_length=max_length,
        logits=logits,
        parity=parity,
        allow_parity_failure=allow_parity_failure,
        tokenizer=tokenizer,
        force=force,
    )
    with _listening(as_json=as_json, quiet=quiet) as listener:
        from gemma_export.exporter import pipeline

        result = pipeline.build(request, listener)
    if as_json:
        JsonLines(out).write(
            {
                "event": "result",
                "bundle": str(result.path),
                "seconds": result.seconds,
                "manifest": _as_json(result.manifest),
            }
        )
    elif not quiet:
        out.print()
        out.print(bundle_table(result.manifest))
        out.print(
            f"\n[bold]{escape(str(result.path))}[/] is ready, {result.seconds:.1f} s. Next:", highlight=False
        )
        for line in _next_steps(result.path, result.manifest):
            out.print(f"  {line}", highlight=False, markup=False)


@app.command()
def calibrate(
    size: options.Size = None,
    checkpoint: options.Checkpoint = None,
    random_weights: options.RandomWeights = False,
    seed: options.WeightsSeed = None,
    tokenizer: options.Tokenizer = None,
    precision: options.Quantized = "int8",
    target: options.Target = "cpu",
    scheme: options.Scheme = None,
    block: options.Block = None,
    calibration_data: options.CalibrationData = None,
    calibration_samples: options.CalibrationSamples = None,
    calibration_length: options.CalibrationLength = None,
    calibration_seed: options.CalibrationSeed = None,
    observer: options.Observer = "mse",
    kv_cache: options.Cache = "float",
    output: Annotated[Path, typer.Option("-o", "--output", help="The file to write.")] = Path("scales.json"),
    force: Annotated[bool, typer.Option("--force", help="Replace an older file.")] = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Find the scales of a quantized build, and keep them in a file for `build --scales`."""
    request = BuildRequest(
        size=size,
        checkpoint=checkpoint,
        random_weights=random_weights,
        seed=seed,
        tokenizer=tokenizer,
        precision=precision,
        target=target,
        scheme_name=scheme,
        block=block,
        calibration=CalibrationRequest(
            calibration_data, calibration_samples, calibration_length, calibration_seed, observer
        ),
        kv_cache=kv_cache,
    )
    if not request.calibrated:
        raise UsageError(
            f"{precision} has nothing to calibrate.", "Add --precision int8 or --precision int4."
        )
    _check_replaceable(output, force=force)
    with _listening(as_json=as_json, quiet=quiet) as listener:
        from gemma_export.exporter.quantize.calibrate import run as run_calibration

        run_calibration(request, output, listener)
    if as_json:
        JsonLines(out).write({"event": "result", "scales": str(output)})
    elif not quiet:
        out.print(f"\n[bold]{escape(str(output))}[/] is ready. Next:", highlight=False)
        line = " ".join(["gemma-export build", *_as_typed(request), "--scales", quote(str(output))])
        out.print(f"  {line}", highlight=False, markup=False)


@app.command()
def sensitivity(
    size: options.Size = None,
    checkpoint: options.Checkpoint = None,
    random_weights: options.RandomWeights = False,
    seed: options.WeightsSeed = None,
    tokenizer: options.Tokenizer = None,
    precision: options.Quantized = "int8",
    target: options.Target = "cpu",
    scheme: options.Scheme = None,
    block: options.Block = None,
    calibration_data: options.CalibrationData = None,
    calibration_samples: options.CalibrationSamples = None,
    calibration_length: options.CalibrationLength = None,
    calibration_seed: options.CalibrationSeed = None,
    observer: options.Observer = "mse",
    scales: options.Scales = None,
    no_calibration: options.NoCalibration = False,
    text: Annotated[
        Path | None, typer.Option(help="Text to measure on; by default the project's own.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="A file for the report, as JSON.")
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Measure what each layer costs when it alone is quantized."""
    request = BuildRequest(
        size=size,
        checkpoint=checkpoint,
        random_weights=random_weights,
        seed=seed,
        tokenizer=tokenizer,
        precision=precision,
        target=target,
        scheme_name=scheme,
        block=block,
        calibration=CalibrationRequest(
            calibration_data, calibration_samples, calibration_length, calibration_seed, observer
        ),
        scales=scales,
        no_calibration=no_calibration,
    )
    if not request.calibrated:
        raise UsageError(f"{precision} quantizes nothing.", "Add --precision int8 or --precision int4.")
    if output is not None:
        _check_replaceable(output, force=True)
    with _listening(as_json=as_json, quiet=False) as listener:
        from gemma_export.exporter.quantize.sensitivity import measure_sensitivity
        from gemma_export.exporter.quantize.sensitivity_table import sensitivity_table
        from gemma_export.graphs.storage import disk_errors

        report = measure_sensitivity(request, text, listener)
    values = report.to_json()
    if output is not None:
        with disk_errors(output):
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_text(json.dumps(values, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    if as_json:
        JsonLines(out).write({"event": "result", **values})
    else:
        out.print(sensitivity_table(report))
        if output is not None:
            out.print(f"\n{escape(str(output))} is written.", highlight=False)


@app.command()
def generate(
    bundle: options.Bundle,
    prompt: Annotated[str, typer.Argument(help="The text to continue; - reads it from standard input.")],
    max_new_tokens: Annotated[int, typer.Option(help="The most tokens to write.")] = 128,
    temperature: options.Temperature = 0.0,
    top_k: options.TopK = 0,
    top_p: options.TopP = 1.0,
    repetition_penalty: options.Penalty = 1.0,
    seed: options.Seed = None,
    stop: options.Stop = None,
    threads: options.Threads = None,
    as_json: options.Json = False,
) -> None:
    """Continue a text."""
    from gemma_export.runtime.session import load

    text = _read_stdin() if prompt == "-" else prompt
    generation = load(bundle, threads=threads).generate(
        text,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stop=tuple(stop or ()),
    )
    if as_json:
        JsonLines(out).write(
            {
                "text": str(generation),
                "tokens": list(generation.tokens),
                "finish_reason": generation.finish_reason,
                "stats": asdict(generation.stats),
            }
        )
        return
    _stream(generation)


@app.command()
def chat(
    bundle: options.Bundle,
    max_new_tokens: Annotated[int, typer.Option(help="The most tokens of an answer.")] = 256,
    temperature: options.Temperature = 0.0,
    top_k: options.TopK = 0,
    top_p: options.TopP = 1.0,
    repetition_penalty: options.Penalty = 1.0,
    seed: options.Seed = None,
    threads: options.Threads = None,
) -> None:
    """Talk with a model; each turn reads only what is new."""
    from gemma_export.errors import ContextFullError
    from gemma_export.runtime.session import load

    session = load(bundle, threads=threads)
    conversation = session.chat()
    err.print("[dim]/reset begins again, /exit or Ctrl-D ends.[/]", highlight=False)
    while (text := _ask()) is not None:
        if text == "/reset":
            conversation = session.chat()
            continue
        if not text:
            continue
        try:
            answer = conversation.say(
                text,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                repetition_penalty=repetition_penalty,
                seed=seed,
            )
            _stream(answer)
        except (ContextFullError, PromptError) as error:
            show_error(error)
        except KeyboardInterrupt:
            err.print("\n[dim]interrupted; the answer counts as far as it came[/]", highlight=False)


@app.command()
def parity(
    bundle: options.Bundle,
    checkpoint: Annotated[
        Path | None, typer.Option(help="The checkpoint; by default the one the bundle was built from.")
    ] = None,
    reference: Annotated[
        Literal["eager", "transformers"],
        typer.Option(help="Our decoder layer by layer, or transformers, whole."),
    ] = "eager",
    text: Annotated[
        Path | None, typer.Option(help="Text to measure on; by default the project's own.")
    ] = None,
    level: Annotated[Literal["quick", "full"], typer.Option(help="How much to measure.")] = "full",
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Folder for parity.json and parity.html.")
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Measure how far a bundle is from its checkpoint."""
    with _listening(as_json=as_json, quiet=False) as listener:
        from gemma_export.exporter.parity.measure import measure_bundle
        from gemma_export.exporter.parity.page import write_report
        from gemma_export.graphs.storage import disk_errors

        report = measure_bundle(
            bundle,
            checkpoint=checkpoint,
            reference=reference,
            text=text,
            level=level,
            listener=listener,
        )
    if output is not None:
        with disk_errors(output):
            output.mkdir(parents=True, exist_ok=True)
            write_report(report, output)
    if as_json:
        JsonLines(out).write({"event": "result", **report.to_json()})
    else:
        out.print(parity_table(report))
        if output is not None:
            out.print(f"\nopen {quote(str(output / 'parity.html'))}", highlight=False, markup=False)
    if report.verdict != "pass":
        raise typer.Exit(1)


@app.command()
def inspect(bundle: options.Bundle, as_json: options.Json = False) -> None:
    """Show what a bundle is, what it costs and how it was measured."""
    from gemma_export.runtime.bundle import open_bundle

    opened = open_bundle(bundle, check="sizes")
    if as_json:
        JsonLines(out).write(_as_json(opened.manifest))
        return
    out.print(bundle_table(opened.manifest))
    out.print("\n[dim]passes[/]", highlight=False)
    for name, count in opened.manifest.graph.passes.items():
        out.print(f"  {name:<32}{count:>5}", highlight=False)
    out.print("\n[dim]files[/]", highlight=False)
    for name, entry in sorted(opened.manifest.files.items()):
        out.print(f"  {name:<32}{entry.size:>16,}  {entry.sha256[:16]}…", highlight=False, markup=False)
    _show_extra(opened.extra)


@app.command()
def verify(bundle: options.Bundle, as_json: options.Json = False) -> None:
    """Check every byte of a bundle against its manifest."""
    from gemma_export.runtime.bundle import open_bundle

    opened = open_bundle(bundle, check="full")
    files = len(opened.manifest.files)
    size = sum(entry.size for entry in opened.manifest.files.values())
    if as_json:
        JsonLines(out).write({"verified": True, "files": files, "bytes": size, "extra": list(opened.extra)})
        return
    _show_extra(opened.extra)
    out.print(f"[green]✓[/] {files} files, {size:,} bytes: all as the manifest says.", highlight=False)


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Show the version.", is_eager=True)] = False,
) -> None:
    """Options of the command itself."""
    if version:
        out.print(f"gemma-export {__version__}", highlight=False)
        raise typer.Exit


def main() -> None:
    """The entry point."""
    run(app)


def _check_replaceable(output: Path, *, force: bool) -> None:
    """Refuses to write over a folder, or over an older file unless told to; before anything takes time."""
    if output.is_dir():
        raise UsageError(f"{output} is a folder.", "Name a file with -o, such as scales.json.")
    if os.path.lexists(output) and not force:
        raise UsageError(f"{output} exists.", "Add --force to replace it, or choose another name with -o.")


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


def _show_extra(extra: tuple[str, ...]) -> None:
    for name in extra:
        out.print(f"[yellow]·[/] {escape(name)} is not of the bundle; nothing reads it.", highlight=False)


@contextmanager
def _listening(*, as_json: bool, quiet: bool) -> Iterator[events.Listener]:
    """A listener for the time of a long command; its bars are gone when it ends, however it ends."""
    if quiet:
        yield events.ignore
        return
    listener = JsonLines(out) if as_json else Screen(err)
    try:
        yield listener
    finally:
        listener.close()


def _stream(pieces: Any) -> None:
    """Writes a generation as it comes, and what it took to a person who watches."""
    for piece in pieces:
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")
    sys.stdout.flush()
    if sys.stderr.isatty():
        stats = pieces.stats
        err.print(
            f"[dim]{stats.prefill_tokens} tokens read in {stats.prefill_seconds:.2f} s, {stats.new_tokens} "
            f"written at {stats.decode_tokens_per_second:.1f} a second ({pieces.finish_reason})[/]",
            highlight=False,
        )


def _ask() -> str | None:
    """One line from the person, or None when they are done."""
    try:
        line = input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None
    except KeyboardInterrupt:
        return None
    return None if line in ("/exit", "/quit") else line


def _read_stdin() -> str:
    data = sys.stdin.buffer.read()
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise PromptError(
            f"The prompt on standard input is not UTF-8: byte {error.start} cannot be decoded.",
            "Convert it to UTF-8 first.",
        ) from None


def _as_json(manifest: Manifest) -> dict[str, Any]:
    """A manifest as its file says it."""
    values: dict[str, Any] = json.loads(manifest.to_json())
    return values


def _next_steps(path: Path, manifest: Manifest) -> Iterator[str]:
    """What to type after a build, as one can paste it into a shell."""
    shell = quote(str(path))
    if manifest.compute_dtype != "bfloat16":  # A CPU, which is what these run on, has no arithmetic for it.
        yield f"gemma-export generate {shell} 'Once upon a time'"
        yield f"gemma-export chat {shell}"
    if manifest.parity.verdict == "not run":
        yield f"gemma-export parity {shell}"
    else:
        yield f"open {quote(str(path / 'parity.html'))}"
