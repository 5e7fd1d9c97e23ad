"""Work on the rows of a weight, some at a time: what is made of them on the way stays in a core's cache."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from gemma_export.graphs.quantized import in_slices


def in_row_slices(work: Callable[[int, int], None], rows: int, step: int) -> None:
    """Calls `work(start, stop)` for consecutive slices of `rows` rows, on several threads.

    Args:
        work: Rows must not depend on each other; it may write into tensors of the caller.
        rows: How many there are.
        step: Rows of a slice.
    """
    # A thread of its own does not inherit the mode that the caller is in.
    with _one_thread_each():
        in_slices(torch.inference_mode()(work), 0, rows, step)


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Of torch, for the threads that begin within: what they work on is too small to be shared out."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
