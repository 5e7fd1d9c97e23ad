"""The command `gemma-export`: what is typed becomes a request, and events become a screen.

What only some commands need is imported by those: `--help`, `inspect` and `generate` work without torch.
"""

from typing import Annotated

import typer

from gemma_export.exporter.commands.build import build
from gemma_export.exporter.commands.check import inspect, parity, verify
from gemma_export.exporter.commands.measure import bench
from gemma_export.exporter.commands.quantize import calibrate, sensitivity
from gemma_export.exporter.commands.run import chat, generate
from gemma_export.exporter.commands.ship import compile_engines, pack, unpack
from gemma_export.exporter.process import out, run
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
for command in (build, calibrate, sensitivity, generate, chat, bench, parity, inspect, verify, pack, unpack):
    app.command()(command)
app.command("compile")(compile_engines)


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
