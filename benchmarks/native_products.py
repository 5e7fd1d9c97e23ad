"""Products with quantized weights: the project's kernels and onnxruntime's own, in turns, in one process.

    python benchmarks/native_products.py [--layers N] [--threads N] [--rounds N]

Layers of Gemma 2B's shape without their attention, over weights in a file: a token is one step of decoding
through them, 512 are a prefill. Each round measures every kernel once and reads the file once, on as many
threads; what is printed are the medians, and the share that decoding has of that reading.
"""

import argparse
import ctypes
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from comparison import print_heading, print_row
from onnx import TensorProto, helper, numpy_helper

from gemma_export.runtime.native import kernels, library

HIDDEN, QKV, GATED = 2048, 2560, 16384
WAYS = ((8, 256), (4, 128))
"""Bits of a weight, and columns that share a scale."""
PREFILL = 512
BUILT_IN = "built-in"


class Graph:
    """A chain of layers, written to a folder.

    Args:
        folder: Where to write it.
        bits: 4 or 8.
        block: Columns that share a scale.
        layers: How many; all of their weights are different.
    """

    def __init__(self, folder: Path, bits: int, block: int, layers: int) -> None:
        self.path, self.data = folder / f"{bits}.onnx", folder / f"{bits}.data"
        self._bits, self._block = bits, block
        self._random = np.random.default_rng(0)
        self._weights: list[onnx.TensorProto] = []
        self._nodes: list[onnx.NodeProto] = []
        self.macs = 0
        x = "x"
        for layer in range(layers):
            x = self._layer(x, str(layer))
        inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["tokens", HIDDEN])]
        outputs = [helper.make_tensor_value_info(x, TensorProto.FLOAT, ["tokens", HIDDEN])]
        constants = [
            numpy_helper.from_array(np.array(numbers, np.int64), name)
            for name, numbers in {"zero": [0], "hidden": [HIDDEN], "axis": [1]}.items()
        ]
        graph = helper.make_graph(self._nodes, "layers", inputs, outputs, [*self._weights, *constants])
        opsets = [helper.make_opsetid("", 24), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
        onnx.save(model, self.path, save_as_external_data=True, location=self.data.name)

    def _layer(self, x: str, layer: str) -> str:
        qkv = self._product(x, f"{layer}.qkv", HIDDEN, QKV)
        self._node("Slice", [qkv, "zero", "hidden", "axis"], [f"{layer}.q"])
        mixed = self._product(f"{layer}.q", f"{layer}.o", HIDDEN, HIDDEN)
        both = self._product(mixed, f"{layer}.gate_up", HIDDEN, 2 * GATED)
        self._node("Split", [both], [f"{layer}.gate", f"{layer}.up"], axis=1, num_outputs=2)
        return self._product(f"{layer}.gate", f"{layer}.down", GATED, HIDDEN)

    def _product(self, x: str, name: str, columns: int, rows: int) -> str:
        blocks = columns // self._block
        # No byte is zero: `read` looks for one.
        codes = self._random.integers(1, 256, (rows, blocks, self._block * self._bits // 8), dtype=np.uint8)
        deviation = 74.0 if self._bits == 8 else 4.6
        scales = np.full((rows, blocks), 1 / (deviation * columns**0.5), np.float32)
        self._weights += [
            numpy_helper.from_array(array, f"{name}.{what}")
            for what, array in (("codes", codes), ("scales", scales))
        ]
        self._node(
            "MatMulNBits",
            [x, f"{name}.codes", f"{name}.scales"],
            [name],
            domain="com.microsoft",
            K=columns,
            N=rows,
            bits=self._bits,
            block_size=self._block,
            accuracy_level=4,
        )
        self.macs += columns * rows
        return name

    def _node(self, operator: str, inputs: list[str], outputs: list[str], **attributes: Any) -> None:
        self._nodes.append(helper.make_node(operator, inputs, outputs, **attributes))


def open_session(graph: Graph, threads: int, name: str) -> ort.InferenceSession:
    """A session that runs these kernels, or onnxruntime's own."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    path = library()
    if name != BUILT_IN and path is not None:
        options.register_custom_ops_library(str(path))
    return ort.InferenceSession(str(graph.path), options, providers=["CPUExecutionProvider"])


def reader(path: Path, threads: int) -> Callable[[], None]:
    """Reads a mapped file once, on several threads: the C library looks for a byte that codes do not have."""
    content = np.memmap(path, np.uint8, "r")
    search = ctypes.CDLL(None).memchr
    search.argtypes, search.restype = (ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t), ctypes.c_void_p
    piece = 1 << 20
    pool = ThreadPoolExecutor(threads)

    def share(first: int) -> None:
        for start in range(first * piece, content.size, threads * piece):
            address, size = content.ctypes.data + start, min(piece, content.size - start)
            found = search(address, 0, size)
            while found is not None:  # A scale has zeros: on from there.
                size -= found + 1 - address
                address = found + 1
                found = search(address, 0, size)

    def read() -> None:
        for _ in pool.map(share, range(threads)):
            pass

    return read


def seconds(action: Callable[[], object]) -> float:
    """How long it takes."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def measure(bits: int, block: int, layers: int, threads: int, rounds: int) -> None:
    """Prints the figures of one format of weights."""
    with tempfile.TemporaryDirectory() as temporary:
        graph = Graph(Path(temporary), bits, block, layers)
        size = graph.data.stat().st_size
        ours = str(kernels())
        sessions = {name: open_session(graph, threads, name) for name in (ours, BUILT_IN)}
        read = reader(graph.data, threads)
        x = {tokens: np.ones((tokens, HIDDEN), np.float32) for tokens in (1, PREFILL)}
        taken: dict[tuple[str, int], list[float]] = defaultdict(list)
        for turn in range(rounds + 1):
            for name, session in sessions.items():
                for tokens in x:
                    # Of steps as short as decoding's, several, so that every turn takes about as long.
                    for _ in range(4 if tokens == 1 else 1):
                        took = seconds(partial(session.run, None, {"x": x[tokens]}))
                        if turn:  # The first touches pages for the first time.
                            taken[name, tokens].append(took)
                took = seconds(read)
                if turn:
                    taken["read", 1].append(took)
    median = {key: statistics.median(values) for key, values in taken.items()}
    reading = size / median["read", 1] / 1e9
    for name in sessions:
        decoding = size / median[name, 1] / 1e9
        prefill = 2 * graph.macs * PREFILL / median[name, PREFILL] / 1e9
        print_row(
            f"{bits} bits, blocks of {block}",
            name,
            f"{decoding:.1f}",
            f"{reading:.1f}",
            f"{decoding / reading:.0%}",
            f"{prefill:.0f}",
            f"{median[BUILT_IN, 1] / median[name, 1]:.2f}",
            f"{median[BUILT_IN, PREFILL] / median[name, PREFILL]:.2f}",
        )


def main() -> None:
    """Measures what the arguments name."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    if library() is None:
        raise SystemExit("There are no kernels here: they were not compiled, or not for this processor.")
    print_heading(
        "weights",
        "kernels",
        "decode GB/s",
        "read GB/s",
        "share",
        "prefill GOP/s",
        "decode / built-in",
        "prefill / built-in",
    )
    for bits, block in WAYS:
        measure(bits, block, arguments.layers, arguments.threads, arguments.rounds)


if __name__ == "__main__":
    main()
