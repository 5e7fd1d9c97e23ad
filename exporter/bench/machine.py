"""What the machine can do: bytes that it reads from memory, and products of matrices, per second.

The limits that a bundle is held against are measured beside it, on as many threads. Of each the fastest pass
counts: what the machine has done once, it can do. Of several ways to read, the fastest one counts too; which
that is, depends on the processor. What `reading` asks for beside decoding is the usual rate instead.
"""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from itertools import pairwise
from pathlib import Path
from statistics import median
from time import perf_counter
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from gemma_export.exporter.bench.values import Machine

Bytes = npt.NDArray[np.uint8]

SECONDS = 0.4
"""How long each way is tried; three times at least."""
_LEAST_BYTES = 256 << 20
_CACHES = 8
"""What is read is so many times as large as the last cache."""
_MATRICES = (1024, 2048)
"""Rows and columns of square matrices: the small ones fit a cache, the large ones keep many cores busy."""
_CACHE_SIZES = Path("/sys/devices/system/cpu/cpu0/cache")


def measure_machine(threads: int, seconds: float = SECONDS) -> Machine:
    """Measures it.

    Args:
        threads: How many work together.
        seconds: How long each way is tried.
    """
    rate, how = max((rate, how) for how, rate in reading_rates(threads, seconds))
    floats = largest_matrix_rate(np.float32, np.float32, threads, seconds)
    integers = largest_matrix_rate(np.uint8, np.int8, threads, seconds)
    return Machine(rate, how, floats, integers)


class Memory(AbstractContextManager["Memory"]):
    """A buffer that several threads read, each a part of its own; larger than the caches.

    Args:
        threads: How many.
    """

    def __init__(self, threads: int) -> None:
        block = 64 * threads
        self._size = max(_LEAST_BYTES, _CACHES * last_cache_bytes()) // block * block
        buffer = np.ones(self._size, np.uint8)  # Written, so that every page is there.
        self._parts = np.split(buffer, threads)
        self._pool = ThreadPoolExecutor(threads)

    def rate(self, how: str, seconds: float) -> float:
        """Bytes per second of the fastest pass.

        Args:
            how: One of `WAYS`.
            seconds: How long it is repeated.
        """
        return self._size / _fastest(lambda: self._read(WAYS[how]), seconds)

    def usual_rate(self, how: str, seconds: float) -> float:
        """Bytes per second of all threads together, none of which waits for another: of each the median pass.

        Args:
            how: One of `WAYS`.
            seconds: How long they read; a pass that has begun is ended.
        """
        read, end = WAYS[how], perf_counter() + seconds

        def rate_of(part: Bytes) -> float:
            times = [perf_counter()]
            while len(times) == 1 or times[-1] < end:
                read(part)
                times.append(perf_counter())
            return part.nbytes / median(later - sooner for sooner, later in pairwise(times))

        return sum(self._pool.map(rate_of, self._parts))

    def _read(self, read: Callable[[Bytes], Any]) -> None:
        for _ in self._pool.map(read, self._parts):
            pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Ends the threads."""
        self._pool.shutdown()


def reading_rates(threads: int, seconds: float) -> Iterator[tuple[str, float]]:
    """Each way to read memory, and the bytes per second of its fastest pass."""
    with Memory(threads) as memory:
        for how in WAYS:
            yield how, memory.rate(how, seconds)


def _dot(part: Bytes) -> Any:
    """Two streams at a time."""
    left, right = np.split(part.view(np.float32), 2)
    return np.dot(left, right)


WAYS: dict[str, Callable[[Bytes], Any]] = {
    "dot product": _dot,
    "maximum": lambda part: part.view(np.int32).max(),
    "bitwise or": lambda part: np.bitwise_or.reduce(part.view(np.uint64)),
}
"""Ways to read all of some bytes; numpy lets other threads run in all of them."""


def largest_matrix_rate(
    left: type[np.generic], right: type[np.generic], threads: int, seconds: float
) -> float | None:
    """As `matrix_rate`, of the size that does best; None where the package onnx is not installed."""
    try:
        return max(matrix_rate(left, right, size, threads, seconds) for size in _MATRICES)
    except ModuleNotFoundError as error:
        if error.name != "onnx":
            raise
        return None


def matrix_rate(
    left: type[np.generic], right: type[np.generic], size: int, threads: int, seconds: float
) -> float:
    """Operations per second of a product of square matrices, of which the right one is constant.

    Args:
        left: np.float32, or np.uint8 for integers.
        right: np.float32, or np.int8.
        size: Rows and columns of both.
        threads: How many work together.
        seconds: How long it is repeated.

    Raises:
        ModuleNotFoundError: The package onnx is not installed, which writes the graph.
    """
    import onnxruntime as ort
    from onnx import helper, numpy_helper

    random = np.random.default_rng(0)
    shape = (size, size)
    numbers = [(30 * random.standard_normal(shape)).astype(np.int8) for _ in range(2)]
    x = (numbers[0].astype(np.int16) + 128).astype(left)
    weights = numpy_helper.from_array(numbers[1].astype(right), "weights")
    # Codes are summed as the graphs of quantized bundles do: inputs around the code 128.
    zero = numpy_helper.from_array(np.array(128, np.uint8), "zero")
    operator, constants, result = (
        ("MatMul", [weights], "float32")
        if left is np.float32
        else ("MatMulInteger", [weights, zero], "int32")
    )
    node = helper.make_node(operator, ["x", *(constant.name for constant in constants)], ["y"])
    types = [helper.np_dtype_to_tensor_dtype(np.dtype(dtype)) for dtype in (left, result)]
    graph = helper.make_graph(
        [node],
        "product",
        [helper.make_tensor_value_info("x", types[0], shape)],
        [helper.make_tensor_value_info("y", types[1], shape)],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return float(2 * size**3 / _fastest(lambda: session.run(None, {"x": x}), seconds))


def last_cache_bytes(caches: Path = _CACHE_SIZES) -> int:
    """Bytes of the largest cache of a core; 0 where the system does not tell."""
    sizes = [0]
    for file in caches.glob("index*/size"):
        text = file.read_text().strip()  # "32768K"
        unit = {"K": 10, "M": 20, "G": 30}.get(text[-1:], 0)
        sizes.append(int(text.rstrip("KMG")) << unit)
    return max(sizes)


def _fastest(run: Callable[[], object], seconds: float) -> float:
    """The shortest time of a call, after one that is not counted."""
    run()
    passes: list[float] = []
    while len(passes) < 3 or sum(passes) < seconds:
        begin = perf_counter()
        run()
        passes.append(perf_counter() - begin)
    return min(passes)


def load_average() -> float:
    """Processes that ran or waited for a core over the last minute."""
    return os.getloadavg()[0]
