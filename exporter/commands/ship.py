"""The commands that bring a bundle to a device, and fit it to that device."""

from pathlib import Path
from shlex import quote
from typing import Annotated

import typer

from gemma_export.exporter import events
from gemma_export.exporter.commands import options
from gemma_export.exporter.commands.console import (
    check_new_file,
    listening,
    manifest_values,
    show_result,
    write_json,
)
from gemma_export.exporter.engines.options import EngineOptions, read_memory, read_sms


def compile_engines(
    bundle: options.Bundle,
    target: options.Compiled,
    sm: options.Sm = None,
    max_batch: options.MaxBatch = None,
    prefill_chunk: options.PrefillChunk = None,
    device: options.DeviceName = None,
    memory: options.Memory = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="A new bundle; by default BUNDLE gets the engines.")
    ] = None,
    force: options.Force = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Build engines from a bundle's graph, on the device itself if need be."""
    from gemma_export.exporter.compile import compile_bundle

    wanted = EngineOptions(read_sms(sm), max_batch, prefill_chunk, device, read_memory(memory))
    with listening(as_json=as_json, quiet=quiet) as listener:
        result = compile_bundle(bundle, target, wanted, output, force=force, listener=listener)
    if as_json:
        manifest = manifest_values(result.manifest)
        write_json(
            {"event": "result", "bundle": str(result.path), "seconds": result.seconds, "manifest": manifest}
        )
    elif not quiet:
        shell = quote(str(result.path))
        steps = (f"gemma-export inspect {shell}", f"gemma-export generate {shell} 'Once upon a time'")
        show_result(result.path, result.seconds, steps)


def pack(
    bundle: options.Bundle,
    archive: Annotated[Path, typer.Argument(metavar="ARCHIVE", help="The file to write, as in bundle.tar.")],
    engines_only: Annotated[
        bool,
        typer.Option("--engines-only", help="Leave out the graph and its weights."),
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an older file.")] = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Put a bundle into one file, the same for the same bundle."""
    from gemma_export.runtime.archive import pack as pack_bundle

    check_new_file(archive, "bundle.tar", force=force)
    with listening(as_json=as_json, quiet=quiet) as listener, events.stage(listener, "pack") as facts:
        facts["bytes"] = size = pack_bundle(
            bundle, archive, engines_only=engines_only, progress=events.bytes_of(listener, "pack")
        )
    if as_json:
        write_json({"event": "result", "archive": str(archive), "bytes": size})
    elif not quiet:
        show_result(archive, steps=(f"gemma-export unpack {quote(str(archive))}",))


def unpack(
    archive: Annotated[Path, typer.Argument(metavar="ARCHIVE", help="The file that `pack` wrote.")],
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="Folder of the bundle; by default the archive's name, here."),
    ] = None,
    force: options.Force = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Take a bundle out of its file; it appears once every byte is as its manifest says."""
    from gemma_export.exporter.bundle import check_replaceable, new_bundle
    from gemma_export.runtime.archive import unpack as unpack_bundle

    folder = output or Path(archive.stem)
    check_replaceable(folder, force=force)
    with (
        listening(as_json=as_json, quiet=quiet) as listener,
        events.stage(listener, "unpack") as facts,
        new_bundle(folder, force=force) as draft,
    ):
        manifest = unpack_bundle(archive, draft, events.bytes_of(listener, "unpack"))
        facts["files"] = len(manifest.files)
    if as_json:
        write_json({"event": "result", "bundle": str(folder)})
    elif not quiet:
        shell = quote(str(folder))
        show_result(folder, steps=(f"gemma-export inspect {shell}", f"gemma-export generate {shell} 'Once'"))
