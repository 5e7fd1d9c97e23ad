"""One MatMulNBits as a graph of its own, run by a set of kernels, and the same arithmetic in numpy."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal
from unittest import mock

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from gemma_export.runtime.native import kernels, library

Floats = npt.NDArray[np.float32]
BUILT_IN = "built-in"
BLOCKS = (16, 32, 64, 128, 256)


@contextmanager
def running(name: str) -> Iterator[None]:
    """Sessions made inside use these kernels."""
    with mock.patch.dict(os.environ, GEMMA_EXPORT_KERNELS=name):
        yield


def available() -> tuple[str, ...]:
    """The kernels that this machine can run; none where there was no compiler."""
    found = []
    for name in ("portable", "avx2", "avx512-vnni"):
        with running(name):
            if kernels() == name:
                found.append(name)
    return tuple(found)


@dataclass(frozen=True)
class Product:
    """A quantized weight [N, K]; codes are unsigned, zero is in the middle of their range.

    `kind` of scales: `any`; `bfloat16`, which bfloat16 holds as they are; `row`, one for all blocks of a row.
    """

    rows: int
    blocks: int
    block: int
    bits: int
    seed: int = 0
    kind: Literal["any", "bfloat16", "row"] = "any"

    @property
    def columns(self) -> int:
        return self.blocks * self.block

    @cached_property
    def codes(self) -> npt.NDArray[np.uint8]:
        return self._random.integers(0, 1 << self.bits, (self.rows, self.columns), dtype=np.uint8)

    @cached_property
    def scales(self) -> Floats:
        scales = self._random.standard_normal((self.rows, self.blocks)).astype(np.float32)
        if self.kind == "bfloat16":
            scales.view(np.uint32)[:] &= 0xFFFF0000
        elif self.kind == "row":
            scales[:] = scales[:, :1]
        return scales

    @property
    def _random(self) -> np.random.Generator:
        return np.random.default_rng(self.seed)

    def graph(self, accuracy_level: int = 4) -> onnx.ModelProto:
        codes = self.codes if self.bits == 8 else self.codes[:, 0::2] | self.codes[:, 1::2] << 4
        node = helper.make_node(
            "MatMulNBits",
            ["x", "codes", "scales"],
            ["y"],
            domain="com.microsoft",
            K=self.columns,
            N=self.rows,
            bits=self.bits,
            block_size=self.block,
            accuracy_level=accuracy_level,
        )
        graph = helper.make_graph(
            [node],
            "product",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, None)],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
            [
                numpy_helper.from_array(codes.reshape(self.rows, self.blocks, -1), "codes"),
                numpy_helper.from_array(self.scales, "scales"),
            ],
        )
        opsets = [helper.make_opsetid("", 24), helper.make_opsetid("com.microsoft", 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=10)

    def expected(self, x: Floats) -> Floats:
        """x [T, K] · Wᵀ as `runtime/native/product.h` defines it, but that sums of fp64 are rounded."""
        blocks = x.reshape(-1, self.blocks, self.block)
        peak = np.abs(blocks).max(-1)
        tiny = peak < np.float32(1e-36)
        inverse = np.float32(127) / np.where(tiny, np.float32(1), peak)
        codes = np.rint(blocks * np.where(tiny, np.float32(0), inverse)[..., None]).astype(np.int64)
        scales = np.where(tiny, np.float32(0), peak / np.float32(127))
        weights = self.codes.reshape(self.rows, self.blocks, self.block).astype(np.int64) - (
            1 << self.bits - 1
        )
        dots = np.einsum("tgk,ngk->gtn", codes, weights)
        total = np.zeros((len(x), self.rows), np.float32)
        for block in range(self.blocks):
            scale = (scales[:, block, None] * self.scales[None, :, block]).astype(np.float64)
            total = (dots[block] * scale + total).astype(np.float32)
        return total


def session(graph: onnx.ModelProto | Path, name: str, threads: int = 1) -> ort.InferenceSession:
    """A session over a graph that runs these kernels."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    with running(name):
        path = library()
        if path is not None:
            options.register_custom_ops_library(str(path))
        model = str(graph) if isinstance(graph, Path) else graph.SerializeToString()
        return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def multiply(product: Product, x: Floats, name: str, threads: int = 1) -> Floats:
    """x · Wᵀ by these kernels."""
    y: Floats = session(product.graph(), name, threads).run(None, {"x": x})[0]
    return y
