"""A graph of one layer of each form, made by hand of parts: on a CPU, and in standard operators."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from ml_dtypes import bfloat16
from onnx import TensorProto, helper, numpy_helper

from gemma_export.graphs.formats import WeightFormat
from gemma_export.graphs.quantization import LinearQuantization
from gemma_export.graphs.storage import DATA_FILE, GRAPH_FILE

V, D, BLOCK = 48, 64, 32
TOKEN = LinearQuantization("w8a8-token", WeightFormat(8))
TENSOR = LinearQuantization("w8a8-tensor", WeightFormat(8), activation_scale=0.05)
ROWS = LinearQuantization("w8", WeightFormat(8))
W8 = LinearQuantization("w8", WeightFormat(8, BLOCK))
W4 = LinearQuantization("w4", WeightFormat(4, BLOCK))
FLOAT = LinearQuantization("float")

CPU = {"embed_tokens": W8, "layers.0.q": TOKEN, "layers.0.o": W8, "layers.0.up": W4, "layers.0.down": FLOAT}
ONNX = {
    "embed_tokens": ROWS,
    "layers.0.q": TENSOR,
    "layers.0.o": ROWS,
    "layers.0.up": W4,
    "layers.0.down": FLOAT,
}


class Graph:
    """A graph of nodes and initializers, as they are added."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.initializers: dict[str, Any] = {}
        self.random = np.random.default_rng(0)

    def add(self, op_type: str, *inputs: str, output: str = "", **attributes: Any) -> str:
        output = output or f"{op_type}_{len(self.nodes)}"
        domain = "com.microsoft" if op_type in ("FusedMatMul", "MatMulNBits") else ""
        node = helper.make_node(op_type, list(inputs), [output], name=output, domain=domain, **attributes)
        self.nodes.append(node)
        return output

    def store(self, name: str, array: Any) -> str:
        self.initializers[name] = numpy_helper.from_array(np.asarray(array), name)
        return name

    def floats(self, name: str, *shape: int, dtype: type = np.float32) -> str:
        return self.store(name, (self.random.standard_normal(shape) / 8).astype(dtype))

    def codes(self, name: str, *shape: int, dtype: type = np.uint8) -> str:
        return self.store(name, self.random.integers(0, 127, shape).astype(dtype))

    def save(self, folder: Path) -> Path:
        ids = helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["B", "T"])
        logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["B", "T", V])
        graph = helper.make_graph(self.nodes, "small", [ids], [logits], list(self.initializers.values()))
        domains = [helper.make_opsetid("", 24), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=domains, ir_version=11)
        onnx.save(
            model, folder / GRAPH_FILE, save_as_external_data=True, location=DATA_FILE, size_threshold=1024
        )
        return folder / GRAPH_FILE


Part = Callable[[Graph, str, str], str]
"""Adds what computes a layer of a name from x, and gives the result."""


def rounded_tokens(graph: Graph, name: str, x: str, rounding: str = "QuantizeLinear") -> str:
    zero = graph.store("zero_point", np.uint8(128))
    largest = graph.add("ReduceMax", graph.add("Abs", x), graph.store("last_axis", [-1]))
    steps = graph.add("Div", largest, graph.store("largest_code", np.float32(127)))
    if rounding == "QuantizeLinear":
        quotients = graph.add("Div", x, steps)
        tokens = graph.add(rounding, quotients, graph.store("one", np.float32(1)), zero)
    else:
        graph.nodes.append(helper.make_node(rounding, [x], [tokens := f"{name}.tokens", "step", "zero"]))
    codes = graph.codes(f"{name}.codes", D, D, dtype=np.int8)
    numbers = graph.add("Cast", graph.add("MatMulInteger", tokens, codes, zero), to=TensorProto.FLOAT)
    by_token = graph.add("Mul", numbers, steps)
    return graph.add("Mul", by_token, graph.floats(f"{name}.scales", D), output=name)


def blocks(
    graph: Graph, name: str, x: str, rows: int = D, bits: int = 8, output: str = "", **attributes: Any
) -> str:
    attributes = {"bits": bits, "block_size": BLOCK, "accuracy_level": 4, **attributes}
    block = attributes["block_size"]
    codes = graph.codes(f"{name}.codes", rows, D // block, block * bits // 8)
    short = graph.floats(f"{name}.scales", rows, D // block, dtype=bfloat16)
    scales = graph.add("Cast", short, output=f"{output or name}.scales.fp32", to=TensorProto.FLOAT)
    return graph.add("MatMulNBits", x, codes, scales, output=output or name, K=D, N=rows, **attributes)


def nibbles(graph: Graph, name: str, x: str) -> str:
    return blocks(graph, name, x, bits=4)


def half(graph: Graph, name: str, x: str) -> str:
    weight = graph.floats(f"{name}.weight", D, D, dtype=np.float16)
    return graph.add("FusedMatMul", x, graph.add("Cast", weight, to=TensorProto.FLOAT), output=name, transB=1)


def lookup(graph: Graph, name: str, ids: str) -> str:
    rows = graph.add("Cast", graph.add("Gather", f"{name}.codes", ids), to=TensorProto.FLOAT)
    signed = graph.add("Sub", rows, graph.store("zero_of_codes", np.float32(128)))
    short = graph.add("Unsqueeze", graph.add("Gather", f"{name}.scales", ids), graph.store("last", [-1]))
    steps = graph.add("Cast", short, to=TensorProto.FLOAT)
    return graph.add("Reshape", graph.add("Mul", signed, steps), graph.store("flat", [0, 0, D]), output=name)


def head(graph: Graph, name: str, x: str) -> str:
    return blocks(graph, name, x, rows=V, output="logits")


CPU_PARTS: Mapping[str, Part] = {
    "lookup": lookup,
    "q": rounded_tokens,
    "o": blocks,
    "up": nibbles,
    "down": half,
    "head": head,
}


# The same for the target onnx.


def numbers(graph: Graph, name: str, rows: int = D) -> str:
    """What codes of 8 bits stand for: [N, K]."""
    codes = graph.codes(f"{name}.codes", rows, D, dtype=np.int8)
    step = graph.store("code_step", np.float32(2**-14))
    return graph.add("DequantizeLinear", codes, step, output=f"{name}.dequantized")


def behind(graph: Graph, name: str, x: str) -> str:
    product = graph.add("MatMul", x, graph.add("Transpose", numbers(graph, name), perm=[1, 0]))
    return graph.add("Mul", product, graph.floats(f"{name}.row_factors", D), output=name)


def rounded(graph: Graph, name: str, x: str) -> str:
    step = graph.store(f"{name}.activation_scale", np.float32(0.05))
    zero = graph.store("zero", np.int8(0))
    return behind(
        graph, name, graph.add("DequantizeLinear", graph.add("QuantizeLinear", x, step, zero), step, zero)
    )


def nibbles_behind(graph: Graph, name: str, x: str) -> str:
    array = graph.random.integers(-8, 8, D * D)
    graph.initializers[f"{name}.codes"] = helper.make_tensor(f"{name}.codes", TensorProto.INT4, [D, D], array)
    scales = graph.floats(f"{name}.scales", D, D // BLOCK)
    weight = graph.add("DequantizeLinear", f"{name}.codes", scales, axis=1, block_size=BLOCK)
    return graph.add("MatMul", x, graph.add("Transpose", weight, perm=[1, 0]), output=name)


def half_behind(graph: Graph, name: str, x: str) -> str:
    weight = graph.add("Cast", graph.floats(f"{name}.weight", D, D, dtype=np.float16), to=TensorProto.FLOAT)
    return graph.add("MatMul", x, graph.add("Transpose", weight, perm=[1, 0]), output=name)


def lookup_behind(graph: Graph, name: str, ids: str) -> str:
    rows = graph.add("Gather", numbers(graph, name, rows=V), ids)
    factors = graph.add("Gather", graph.floats(f"{name}.row_factors", V), ids)
    steps = graph.add("Unsqueeze", factors, graph.store("last", [-1]))
    return graph.add("Mul", rows, steps, output=name)


def head_behind(graph: Graph, name: str, x: str) -> str:
    product = graph.add("MatMul", x, graph.add("Transpose", f"{name}.dequantized", perm=[1, 0]))
    return graph.add("Mul", product, f"{name}.row_factors", output="logits")


ONNX_PARTS: Mapping[str, Part] = {
    "lookup": lookup_behind,
    "q": rounded,
    "o": behind,
    "up": nibbles_behind,
    "down": half_behind,
    "head": head_behind,
}


def write(folder: Path, parts: Mapping[str, Part]) -> Path:
    graph = Graph()
    x = parts["lookup"](graph, "embed_tokens", "input_ids")
    for name in ("q", "o", "up", "down"):
        x = parts[name](graph, f"layers.0.{name}", x)
    parts["head"](graph, "embed_tokens", x)
    return graph.save(folder)
