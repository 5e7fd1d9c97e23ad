"""The command `gemma-export`: what is typed becomes a request, events become a screen, errors an exit code.

Exit codes: 0 done, 1 it failed, 2 it was asked for wrongly, 128 + n ended by the signal n (130: Ctrl-C).
"""

import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from enum import StrEnum
from io import TextIOWrapper
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape

from gemma_export.errors import (
    GemmaExportError,
    MissingDependencyError,
    PromptError,
    StorageError,
    UsageError,
)
from gemma_export.exporter import events
from gemma_export.exporter.screen import JsonLines, Screen, bundle_table, parity_table
from gemma_export.runtime.bundle import Manifest
from gemma_export.version import __version__

DEBUG = "GEMMA_EXPORT_DEBUG"
"""Set to 1, this environment variable shows the traceback of a defect."""

_INTERRUPTED = tuple(128 + number for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP))

# The packages of each extra, by the name they are imported under.
_EXTRAS = {
    "torch": "export",
    "onnx": "export",
    "onnx_ir": "export",
    "onnxscript": "export",
    "safetensors": "export",
    "tokenizers": "export",
    "onnxruntime": "cpu",
    "transformers": "parity",
    "matplotlib": "parity",
}

app = typer.Typer(
    name="gemma-export",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode="rich",
    help="Turn a Gemma checkpoint into a bundle that runs on a device, and prove that it says the same.",
    context_settings={"help_option_names": ["-h", "--help"]},
)
out = Console(soft_wrap=True)
err = Console(stderr=True, soft_wrap=True)


class Level(StrEnum):
    """How much a parity gate measures."""

    none = "none"
    quick = "quick"
    full = "full"


class LogitsOf(StrEnum):
    """Whose logits a graph gives."""

    last = "last"
    all = "all"


class ReferenceKind(StrEnum):
    """What a bundle is held against."""

    eager = "eager"
    transformers = "transformers"


BundleArgument = Annotated[Path, typer.Argument(metavar="BUNDLE", help="The folder that `build` wrote.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Write JSON for programs.")]
TemperatureOption = Annotated[float, typer.Option(help="0 always takes the likeliest token.")]
TopKOption = Annotated[int, typer.Option(help="Draw from the K likeliest tokens; 0 from all.")]
TopPOption = Annotated[float, typer.Option(help="Draw from the likeliest tokens that make up P.")]
PenaltyOption = Annotated[float, typer.Option(help="Above 1, tokens that were used become less likely.")]
SeedOption = Annotated[int | None, typer.Option(help="Makes drawing repeatable.")]
StopOption = Annotated[list[str] | None, typer.Option("--stop", help="A text to stop at; may be repeated.")]
ThreadsOption = Annotated[int | None, typer.Option(help="Threads; by default one per core.")]


@app.command()
def build(
    size: Annotated[str | None, typer.Option(help="tiny, 2b or 7b; by default the checkpoint's.")] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Folder or file: safetensors (Hugging Face) or .ckpt (Google).")
    ] = None,
    random_weights: Annotated[
        bool, typer.Option("--random-weights", help="Try a size without its weights.")
    ] = False,
    seed: Annotated[int | None, typer.Option(help="Of the random weights.")] = None,
    precision: Annotated[str, typer.Option(help="fp32, fp16 or bf16.")] = "fp32",
    target: Annotated[str, typer.Option(help="cpu (onnxruntime) or onnx (standard operators).")] = "cpu",
    max_length: Annotated[
        int | None, typer.Option(help="Tokens of prompt and answer together; by default the model's context.")
    ] = None,
    logits: Annotated[
        LogitsOf, typer.Option(help="Of the last token, or of all (for perplexity).")
    ] = LogitsOf.last,
    parity: Annotated[Level, typer.Option(help="How much to measure against the checkpoint.")] = Level.quick,
    allow_parity_failure: Annotated[
        bool, typer.Option("--allow-parity-failure", help="Keep a bundle that is outside its budget.")
    ] = False,
    tokenizer: Annotated[Path | None, typer.Option(help="A tokenizer.model from elsewhere.")] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Folder of the bundle.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an older bundle.")] = False,
    as_json: JsonOption = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Say nothing; with --json, the result.")
    ] = False,
) -> None:
    """Export a checkpoint to a bundle, and check that it says what the checkpoint says."""
    from gemma_export.exporter.request import BuildRequest

    request = BuildRequest(
        output=output,
        size=size,
        checkpoint=checkpoint,
        random_weights=random_weights,
        seed=seed,
        precision=precision,
        target=target,
        max_length=max_length,
        logits=logits.value,
        parity=parity.value,
        allow_parity_failure=allow_parity_failure,
        tokenizer=tokenizer,
        force=force,
    )
    with _listening(as_json=as_json, quiet=quiet) as listener:
        from gemma_export.exporter.pipeline import build as run

        result = run(request, listener)
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
        path = _shell(result.path)
        out.print(
            f"\n[bold]{escape(str(result.path))}[/] is ready, {result.seconds:.1f} s. Next:", highlight=False
        )
        out.print(f"  gemma-export generate {path} 'Once upon a time'", highlight=False, markup=False)
        out.print(f"  gemma-export chat {path}", highlight=False, markup=False)
        if result.report is not None:
            out.print(f"  open {_shell(result.path / 'parity.html')}", highlight=False, markup=False)


@app.command()
def generate(
    bundle: BundleArgument,
    prompt: Annotated[str, typer.Argument(help="The text to continue; - reads it from standard input.")],
    max_new_tokens: Annotated[int, typer.Option(help="The most tokens to write.")] = 128,
    temperature: TemperatureOption = 0.0,
    top_k: TopKOption = 0,
    top_p: TopPOption = 1.0,
    repetition_penalty: PenaltyOption = 1.0,
    seed: SeedOption = None,
    stop: StopOption = None,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
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
    bundle: BundleArgument,
    max_new_tokens: Annotated[int, typer.Option(help="The most tokens of an answer.")] = 256,
    temperature: TemperatureOption = 0.0,
    top_k: TopKOption = 0,
    top_p: TopPOption = 1.0,
    repetition_penalty: PenaltyOption = 1.0,
    seed: SeedOption = None,
    threads: ThreadsOption = None,
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
            _show_error(error)
        except KeyboardInterrupt:
            err.print("\n[dim]interrupted; the answer counts as far as it came[/]", highlight=False)


@app.command()
def parity(
    bundle: BundleArgument,
    checkpoint: Annotated[
        Path | None, typer.Option(help="The checkpoint; by default the one the bundle was built from.")
    ] = None,
    reference: Annotated[
        ReferenceKind, typer.Option(help="Our decoder layer by layer, or transformers, whole.")
    ] = ReferenceKind.eager,
    text: Annotated[
        Path | None, typer.Option(help="Text to measure on; by default the project's own.")
    ] = None,
    level: Annotated[Level, typer.Option(help="quick or full.")] = Level.full,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Folder for parity.json and parity.html.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure how far a bundle is from its checkpoint."""
    if level is Level.none:
        raise UsageError("There is nothing to measure with --level none.", "Choose quick or full.")
    with _listening(as_json=as_json, quiet=False) as listener:
        from gemma_export.exporter.measure import measure_bundle
        from gemma_export.exporter.report import write_report
        from gemma_export.graphs.storage import disk_errors

        report = measure_bundle(
            bundle,
            checkpoint=checkpoint,
            reference=reference.value,
            text=text,
            level="full" if level is Level.full else "quick",
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
            out.print(f"\nopen {_shell(output / 'parity.html')}", highlight=False, markup=False)
    if report.verdict != "pass":
        raise typer.Exit(1)


@app.command()
def inspect(bundle: BundleArgument, as_json: JsonOption = False) -> None:
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
def verify(bundle: BundleArgument, as_json: JsonOption = False) -> None:
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
    """Runs the command line; the only place that turns an error into an exit code."""
    _prepare_process()
    try:
        app()
    except SystemExit as end:
        if end.code in _INTERRUPTED:
            err.print("\nInterrupted. A bundle that was not finished is gone.", highlight=False)
        raise
    except GemmaExportError as error:
        _fail(error)
    except ModuleNotFoundError as error:
        extra = _EXTRAS.get((error.name or "").split(".")[0])
        if extra is None:
            _defect(error)
        _fail(
            MissingDependencyError(
                f"The package {error.name} is not installed.",
                f'Install it: pip install "gemma-export[{extra}]"',
            )
        )
    except OSError as error:
        _fail(StorageError(f"The system refused: {error}.", "Check the disk and the permissions."))
    except Exception as error:
        _defect(error)


def _prepare_process() -> None:
    """Streams that take any text, and an orderly end when another process asks for one."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if isinstance(sys.stdin, TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # What is not UTF-8 is refused where it is a prompt.
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, _end)


def _end(number: int, frame: FrameType | None) -> None:
    """Ends the process through every `finally`, as Ctrl-C does."""
    sys.exit(128 + number)


def _fail(error: GemmaExportError) -> NoReturn:
    _show_error(error)
    sys.exit(error.exit_code)


def _defect(error: Exception) -> NoReturn:
    """Reports what should not happen, without a traceback unless one is asked for."""
    if os.environ.get(DEBUG) == "1":
        raise error
    err.print(f"[bold red]defect:[/] {type(error).__name__}: {escape(str(error))}", highlight=False)
    err.print(f"[bold]hint:[/] Please report it, with what is shown when {DEBUG}=1 is set.", highlight=False)
    sys.exit(1)


def _show_error(error: GemmaExportError) -> None:
    err.print(f"[bold red]error:[/] {escape(error.message)}", highlight=False)
    err.print(f"[bold]hint:[/] {escape(error.hint)}", highlight=False)


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


def _shell(path: Path) -> str:
    """A path as one can paste it into a shell."""
    from shlex import quote

    return quote(str(path))
