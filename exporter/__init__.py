"""Checkpoint to bundle: reading, tracing, writing, and the command line."""
