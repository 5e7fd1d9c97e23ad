"""`python -m gemma_export` is the command `gemma-export`."""

from gemma_export.exporter.cli import main

main()
