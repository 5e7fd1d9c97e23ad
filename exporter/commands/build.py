"""The command that builds a bundle."""

from collections.abc import Iterator
from pathlib import Path
from shlex import quote

from gemma_export.exporter.commands import options
from gemma_export.exporter.commands import request_options as groups
from gemma_export.exporter.commands.console import listening, manifest_values, show_result, write_json
from gemma_export.exporter.process import out
from gemma_export.exporter.request import BuildRequest
from gemma_export.exporter.screen import bundle_table
from gemma_export.runtime.bundle import Manifest


@groups.takes_request(
    groups.model,
    groups.any_precision,
    groups.calibration,
    groups.instead_of_calibration,
    groups.cache,
    groups.layers_kept,
    groups.graph,
    groups.engine_options,
    groups.gate,
    groups.output,
)
def build(request: BuildRequest, as_json: options.Json = False, quiet: options.Quiet = False) -> None:
    """Export a checkpoint to a bundle, and check that it says what the checkpoint says."""
    with listening(as_json=as_json, quiet=quiet) as listener:
        from gemma_export.exporter import pipeline

        result = pipeline.build(request, listener)
    if as_json:
        manifest = manifest_values(result.manifest)
        write_json(
            {"event": "result", "bundle": str(result.path), "seconds": result.seconds, "manifest": manifest}
        )
    elif not quiet:
        out.print()
        out.print(bundle_table(result.manifest))
        show_result(result.path, result.seconds, tuple(_next_steps(result.path, result.manifest)))


def _next_steps(path: Path, manifest: Manifest) -> Iterator[str]:
    """What to type after a build, as one can paste it into a shell."""
    shell = quote(str(path))
    if manifest.engines:  # They run on their GPU, which need not be here.
        yield f"gemma-export inspect {shell}"
        yield f"gemma-export pack {shell} {quote(f'{path.name}.tar')} --engines-only"
    elif manifest.compute_dtype != "bfloat16":  # A CPU has no arithmetic for it.
        yield f"gemma-export generate {shell} 'Once upon a time'"
        yield f"gemma-export chat {shell}"
    if manifest.parity.verdict == "not run":
        yield f"gemma-export parity {shell}"
    else:
        yield f"open {quote(str(path / 'parity.html'))}"
