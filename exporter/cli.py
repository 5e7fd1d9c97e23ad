"""The command `gemma-export`: what is typed becomes a request, and events become a screen.

What only some commands need is imported by those: `--help`, `inspect` and `generate` work without torch.
"""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from shlex import quote
from typing import Annotated, Any, Literal

import typer
from rich.markup import escape

from gemma_export.errors import PromptError
from gemma_export.exporter import events
from gemma_export.exporter.process import err, out, run, show_error
from gemma_export.exporter.request import ParityLevel
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
        LogitsKind, typer.Option(help="Of the last token, or of all (for perplexity).")
    ] = "last",
    parity: Annotated[
        ParityLevel, typer.Option(help="How much to measure against the checkpoint.")
    ] = "quick",
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
            show_error(error)
        except KeyboardInterrupt:
            err.print("\n[dim]interrupted; the answer counts as far as it came[/]", highlight=False)


@app.command()
def parity(
    bundle: BundleArgument,
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
    as_json: JsonOption = False,
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
    """The entry point."""
    run(app)


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
