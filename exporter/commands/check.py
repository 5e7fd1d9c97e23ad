"""The commands that look at a finished bundle."""

from pathlib import Path
from shlex import quote
from typing import Annotated, Literal

import typer

from gemma_export.disk import disk_errors
from gemma_export.exporter.commands import options
from gemma_export.exporter.commands.console import listening, manifest_values, show_extra, write_json
from gemma_export.exporter.engines.table import engine_table
from gemma_export.exporter.process import out
from gemma_export.exporter.screen import bundle_table, parity_table


def parity(
    bundle: options.Bundle,
    checkpoint: Annotated[
        Path | None, typer.Option(help="The checkpoint; by default the one the bundle was built from.")
    ] = None,
    reference: Annotated[
        Literal["eager", "transformers"],
        typer.Option(help="Our decoder layer by layer, or transformers, whole."),
    ] = "eager",
    text: options.Text = None,
    level: Annotated[Literal["quick", "full"], typer.Option(help="How much to measure.")] = "full",
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Folder for parity.json and parity.html.")
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Measure how far a bundle is from its checkpoint."""
    with listening(as_json=as_json, quiet=False) as listener:
        from gemma_export.exporter.parity.measure import measure_bundle
        from gemma_export.exporter.parity.page import write_report

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
        write_json({"event": "result", **report.to_json()})
    else:
        out.print(parity_table(report))
        if output is not None:
            out.print(f"\nopen {quote(str(output / 'parity.html'))}", highlight=False, markup=False)
    if report.verdict != "pass":
        raise typer.Exit(1)


def inspect(bundle: options.Bundle, as_json: options.Json = False) -> None:
    """Show what a bundle is, what it costs and how it was measured."""
    from gemma_export.runtime.bundle import open_bundle

    opened = open_bundle(bundle, check="sizes")
    if as_json:
        write_json(manifest_values(opened.manifest))
        return
    out.print(bundle_table(opened.manifest))
    for engine in opened.manifest.engines:
        out.print()
        out.print(engine_table(engine, opened.manifest))
    out.print("\n[dim]passes[/]", highlight=False)
    for name, count in opened.manifest.graph.passes.items():
        out.print(f"  {name:<32}{count:>5}", highlight=False)
    out.print("\n[dim]files[/]", highlight=False)
    for name, entry in sorted(opened.manifest.files.items()):
        out.print(f"  {name:<32}{entry.size:>16,}  {entry.sha256[:16]}…", highlight=False, markup=False)
    show_extra(opened.extra)


def verify(bundle: options.Bundle, as_json: options.Json = False) -> None:
    """Check every byte of a bundle against its manifest."""
    from gemma_export.runtime.bundle import open_bundle

    opened = open_bundle(bundle, check="full")
    files = len(opened.manifest.files)
    size = sum(entry.size for entry in opened.manifest.files.values())
    if as_json:
        write_json({"verified": True, "files": files, "bytes": size, "extra": list(opened.extra)})
        return
    show_extra(opened.extra)
    out.print(f"[green]✓[/] {files} files, {size:,} bytes: all as the manifest says.", highlight=False)
