"""The audit, on graphs made by hand of which one part at a time is not what was asked for.

Asked for is a table that is looked up, a layer of each form, and a head over the table.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from ml_dtypes import bfloat16
from onnx import TensorProto, helper, numpy_helper
from support.graphs import random_weights, small_config

from gemma_export.errors import GraphError
from gemma_export.exporter import audit as audit_module
from gemma_export.exporter.audit import AuditedTensor, audit, optimized
from gemma_export.exporter.trace import bind_weights, trace
from gemma_export.graphs import schedule
from gemma_export.graphs.formats import WeightFormat
from gemma_export.graphs.passes.half_precision import half_precision
from gemma_export.graphs.passes.lower_group_query_attention import lower_group_query_attention
from gemma_export.graphs.passes.lower_linear import lower_linear
from gemma_export.graphs.passes.quantize_dequantize import quantize_dequantize
from gemma_export.graphs.passes.quantize_embedding import quantize_embedding
from gemma_export.graphs.passes.quantize_linear import quantize_linear
from gemma_export.graphs.passes.remove_dead_code import remove_dead_code
from gemma_export.graphs.passes.store_half import store_half
from gemma_export.graphs.quantization import LinearQuantization, Quantization
from gemma_export.graphs.storage import DATA_FILE, GRAPH_FILE, write_model

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


def test_what_was_asked_for_on_a_cpu(tmp_path: Path) -> None:
    graph = write(tmp_path, CPU_PARTS)
    scales = 2 * D * D // BLOCK
    assert audit(graph, CPU, "cpu", {"layers.0.o": 0.25}) == (
        AuditedTensor("embed_tokens", "w8", "MatMulNBits", "Gather", 8, BLOCK, V * D + 2 * V * D // BLOCK),
        AuditedTensor("layers.0.q", "w8a8-token", "MatMulInteger", None, 8, None, D * D + 4 * D),
        AuditedTensor("layers.0.o", "w8", "MatMulNBits", None, 8, BLOCK, D * D + scales, 0.25),
        AuditedTensor("layers.0.up", "w4", "MatMulNBits", None, 4, BLOCK, D * D // 2 + scales),
        AuditedTensor("layers.0.down", "float", "FusedMatMul", None, 16, None, 2 * D * D),
    )


def test_what_was_asked_for_in_standard_operators(tmp_path: Path) -> None:
    graph = write(tmp_path, ONNX_PARTS)
    assert audit(graph, ONNX, "onnx") == (
        AuditedTensor("embed_tokens", "w8", "MatMul", "Gather", 8, None, V * D + 4 * V),
        AuditedTensor("layers.0.q", "w8a8-tensor", "MatMul", None, 8, None, D * D + 4 * D + 4),
        AuditedTensor("layers.0.o", "w8", "MatMul", None, 8, None, D * D + 4 * D),
        AuditedTensor("layers.0.up", "w4", "MatMul", None, 4, BLOCK, D * D // 2 + 4 * D * D // BLOCK),
        AuditedTensor("layers.0.down", "float", "MatMul", None, 16, None, 2 * D * D),
    )


# Sabotage. Each is a part that computes what the right one does, or nearly.


def left_float(graph: Graph, name: str, x: str) -> str:
    return graph.add("MatMul", x, graph.floats(f"{name}.weight", D, D), output=name)


def folded(graph: Graph, name: str, x: str) -> str:
    """A DequantizeLinear that was evaluated: its result is what is stored."""
    product = graph.add("MatMul", x, graph.floats(f"{name}.dequantized", D, D))
    return graph.add("Mul", product, graph.floats(f"{name}.row_factors", D), output=name)


def folded_under_another_name(graph: Graph, name: str, x: str) -> str:
    product = graph.add("MatMul", x, graph.floats("folded_7", D, D))
    return graph.add("Mul", product, graph.floats(f"{name}.scales", D), output=name)


def one_scale_for_all_tokens(graph: Graph, name: str, x: str) -> str:
    return rounded_tokens(graph, name, x, rounding="DynamicQuantizeLinear")


def products_of_floats(graph: Graph, name: str, x: str) -> str:
    return blocks(graph, name, x, accuracy_level=0)


def other_blocks(graph: Graph, name: str, x: str) -> str:
    return blocks(graph, name, x, block_size=16)


def floats_beside(graph: Graph, name: str, x: str) -> str:
    """Codes, and what they were made of, which something small reads."""
    rows = graph.add("Gather", graph.floats(f"{name}.weight", D, D), graph.store("first_row", [0]))
    return blocks(graph, name, graph.add("Add", x, graph.add("Mul", rows, graph.store("nil", np.float32(0)))))


def computed_twice(graph: Graph, name: str, x: str) -> str:
    twice = graph.add("MatMul", x, graph.floats(f"{name}.weight", D, D))
    return blocks(graph, name, graph.add("Add", x, twice))


def numbers_of_codes(graph: Graph, name: str, x: str) -> str:
    """Codes that a product of floats reads."""
    codes = graph.add("Cast", graph.codes(f"{name}.codes", D, D, dtype=np.int8), to=TensorProto.FLOAT)
    return graph.add("Mul", graph.add("MatMul", x, codes), graph.floats(f"{name}.scales", D), output=name)


def not_there(graph: Graph, name: str, x: str) -> str:
    return x


def float_lookup(graph: Graph, name: str, ids: str) -> str:
    return graph.add("Gather", graph.floats(f"{name}.weight", V, D), ids, output=name)


def float_head(graph: Graph, name: str, x: str) -> str:
    return graph.add("FusedMatMul", x, f"{name}.weight", output="logits", transB=1)


def another_table(graph: Graph, name: str, ids: str) -> str:
    """The same codes in an initializer of their own."""
    graph.codes(f"{name}.lookup.codes", V, D // BLOCK, BLOCK)
    graph.floats(f"{name}.lookup.scales", V, D // BLOCK, dtype=bfloat16)
    return graph.add("Identity", lookup(graph, f"{name}.lookup", ids), output=name)


def stranger(graph: Graph, name: str, x: str) -> str:
    """A product with a weight of no layer."""
    return half(graph, name, graph.add("MatMul", x, graph.floats("adapter.weight", D, D)))


FLOAT_WEIGHT = rf"MatMul over float32 \[{D}, {D}\]"
CPU_SABOTAGE = {
    "left float": (
        {"q": left_float},
        rf"layers.0.q was to be w8a8-token, .*{FLOAT_WEIGHT} \(layers.0.q.weight\)",
    ),
    "left half": (
        {"o": half},
        r"layers.0.o was to be w8, .*FusedMatMul over float16 .*\(layers.0.o.weight\)",
    ),
    "folded": ({"q": folded}, rf"layers.0.q was .*{FLOAT_WEIGHT} \(layers.0.q.dequantized\)"),
    "folded, renamed": ({"q": folded_under_another_name}, rf"layers.0.q was .*{FLOAT_WEIGHT} \(folded_7\)"),
    "Q/DQ": ({"o": behind}, r"layers.0.o was to be w8, .* MatMul over int8 .* activations of Mul"),
    "codes made floats": ({"q": numbers_of_codes}, r"layers.0.q was .* MatMul over int8"),
    "tensor for token": ({"q": one_scale_for_all_tokens}, r"layers.0.q was .*one scale for .* all tokens"),
    "8 for 4 bits": ({"up": blocks}, r"layers.0.up was to be w4, .* with 8 bits"),
    "4 for 8 bits": ({"o": nibbles}, r"layers.0.o was to be w8, .* with 4 bits"),
    "other blocks": ({"o": other_blocks}, r"layers.0.o was to be w8, .*blocks of 16"),
    "float arithmetic": ({"o": products_of_floats}, r"layers.0.o was to be w8, .*accuracy level 0"),
    "codes for float": (
        {"down": rounded_tokens},
        r"layers.0.down was to be float, .* MatMulInteger over int8",
    ),
    "floats beside": ({"o": floats_beside}, r"layers.0.o was .*beside layers.0.o.weight with 4,096 floats"),
    "computed twice": ({"o": computed_twice}, r"layers.0.o was .*MatMul over float32.* and MatMulNBits"),
    "not there": ({"up": not_there}, r"layers.0.up was to be w4, and the graph has nothing of that name"),
    "float table": (
        {"lookup": float_lookup, "head": float_head},
        r"embed_tokens was .* FusedMatMul over float32",
    ),
    "float lookup": (
        {"lookup": float_lookup},
        r"embed_tokens was .* Gather over float32 .* beside MatMulNBits",
    ),
    "stored twice": ({"lookup": another_table}, r"embed_tokens was .*\(embed_tokens.lookup.codes\).* beside"),
    "two layers": (
        {"q": left_float, "up": blocks},
        r"layers.0.q .*; 1 more are wrong, layers.0.up among them",
    ),
    "stranger": ({"down": stranger}, r"Nothing says how a product is quantized: .*\(adapter.weight\)"),
}
ONNX_SABOTAGE = {
    "left float": ({"o": left_float}, rf"layers.0.o was to be w8, .*{FLOAT_WEIGHT} \(layers.0.o.weight\)"),
    "folded": ({"o": folded}, rf"layers.0.o was .*{FLOAT_WEIGHT} \(layers.0.o.dequantized\)"),
    "folded, renamed": ({"o": folded_under_another_name}, rf"layers.0.o was .*{FLOAT_WEIGHT} \(folded_7\)"),
    "activations not rounded": ({"q": behind}, r"layers.0.q was to be w8a8-tensor, .*activations of Mul"),
    "activations rounded": ({"o": rounded}, r"layers.0.o was to be w8, .*activations of DequantizeLinear"),
    "8 for 4 bits": ({"up": behind}, r"layers.0.up was to be w4, .* over int8 .*blocks of None"),
    "float table": (
        {"lookup": float_lookup, "head": float_head},
        r"embed_tokens was .* FusedMatMul over float32",
    ),
    "MatMulNBits": ({"o": blocks}, r"layers.0.o was to be w8, .* MatMulNBits"),
}


@pytest.mark.parametrize("sabotage", CPU_SABOTAGE)
def test_sabotage_on_a_cpu(tmp_path: Path, sabotage: str) -> None:
    parts, message = CPU_SABOTAGE[sabotage]
    graph = write(tmp_path, {**CPU_PARTS, **parts})
    with pytest.raises(GraphError, match=message):
        audit(graph, CPU, "cpu")


@pytest.mark.parametrize("sabotage", ONNX_SABOTAGE)
def test_sabotage_in_standard_operators(tmp_path: Path, sabotage: str) -> None:
    parts, message = ONNX_SABOTAGE[sabotage]
    graph = write(tmp_path, {**ONNX_PARTS, **parts})
    with pytest.raises(GraphError, match=message):
        audit(graph, ONNX, "onnx")


def test_a_layer_that_nothing_was_asked_of(tmp_path: Path) -> None:
    graph = write(tmp_path, CPU_PARTS)
    for name in CPU.keys() - {"embed_tokens"}:
        rest = {key: how for key, how in CPU.items() if key != name}
        with pytest.raises(GraphError, match=rf"Nothing says how a product is quantized: .*\({name}\."):
            audit(graph, rest, "cpu")


def test_what_onnxruntime_makes_of_it_counts_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tmp_path / "other"
    other.mkdir()
    spoilt = write(other, {**CPU_PARTS, "q": folded_under_another_name})
    monkeypatch.setattr(audit_module, "optimized", lambda graph, release: ir.load(spoilt))
    with pytest.raises(
        GraphError, match=rf"layers.0.q was to be w8a8-token, and onnxruntime runs {FLOAT_WEIGHT}"
    ):
        audit(write(tmp_path, CPU_PARTS), CPU, "cpu")


def test_onnxruntime_says_what_it_runs(tmp_path: Path) -> None:
    graph = write(tmp_path, {**CPU_PARTS, "q": rounded})
    # Codes on both sides of a product of floats: onnxruntime makes one of codes of them.
    operators = [node.op_type for node in optimized(graph).graph]
    assert "MatMulIntegerToFloat" in operators
    assert "MatMul" not in operators


def test_no_weight_is_read(tmp_path: Path) -> None:
    graph = write(tmp_path, CPU_PARTS)
    data = tmp_path / DATA_FILE
    size = data.stat().st_size
    with data.open("wb") as file:  # As long as it was, without a byte on the disk.
        file.truncate(size)
    found = audit(graph, CPU, "cpu")
    assert sum(tensor.bytes for tensor in found) > 5 * D * D
    as_run = optimized(graph, ["layers.0.down"]).graph
    for value in as_run.initializers.values():
        assert value.const_value is not None
        assert value.const_value.nbytes <= 1024 or isinstance(value.const_value, ir.ExternalTensor)
    # Scales of blocks would be written down in 32 bits: of a large model a gigabyte.
    assert {"layers.0.o.scales", "embed_tokens.scales"} <= {value.name for value in as_run.inputs}


def test_a_graph_that_onnxruntime_cannot_load(tmp_path: Path) -> None:
    graph = write(tmp_path, CPU_PARTS)
    (tmp_path / DATA_FILE).unlink()
    with pytest.raises(GraphError, match=r"onnxruntime .* cannot load the graph"):
        audit(graph, CPU, "cpu")


# Graphs of the decoder, as the passes make them.

CONFIG = small_config(num_layers=2)
SMALL_BLOCKS = WeightFormat(8, 16)


@pytest.fixture(scope="module")
def traced() -> ir.Model:
    return trace(CONFIG, 16)


@pytest.fixture
def canonical(traced: ir.Model) -> ir.Model:
    model = traced.clone()
    made = (output for node in model.graph for output in node.outputs)
    for value in (*model.graph.inputs, *model.graph.initializers.values(), *made):
        value.type = None if value.dtype is None else ir.TensorType(value.dtype)  # A clone shares it.
    bind_weights(model, CONFIG, random_weights(CONFIG))
    schedule.canonicalize(model)
    return model


def forms(table: LinearQuantization, *others: LinearQuantization) -> dict[str, LinearQuantization]:
    """A form of every layer, in turn."""
    parts = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
    names = [f"layers.{layer}.{part}" for layer in range(CONFIG.num_layers) for part in parts]
    return {"embed_tokens": table, **{name: others[i % len(others)] for i, name in enumerate(names)}}


def test_the_decoder_on_a_cpu(canonical: ir.Model, tmp_path: Path) -> None:
    w8 = replace(W8, format=SMALL_BLOCKS)
    linears = forms(w8, TOKEN, w8, replace(W4, format=WeightFormat(4, 16)), FLOAT, TOKEN)
    lower_group_query_attention(canonical)
    quantize_linear(canonical, linears)
    quantize_embedding(canonical, linears)
    lower_linear(canonical)
    remove_dead_code(canonical)
    store_half(canonical, torch.float16)
    write_model(canonical, tmp_path)
    found = audit(tmp_path / GRAPH_FILE, linears, "cpu")
    assert [tensor.form for tensor in found] == [how.form for how in linears.values()]
    operators = {
        "w8a8-token": "MatMulInteger",
        "w8": "MatMulNBits",
        "w4": "MatMulNBits",
        "float": "FusedMatMul",
    }
    assert all(tensor.operator == operators[tensor.form] for tensor in found)
    for name, how in linears.items():
        with pytest.raises(GraphError, match=rf"{name} was to be"):
            audit(tmp_path / GRAPH_FILE, {**linears, name: TOKEN if how.form != "w8a8-token" else w8}, "cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_the_decoder_in_standard_operators(canonical: ir.Model, tmp_path: Path, dtype: torch.dtype) -> None:
    linears = forms(ROWS, TENSOR, ROWS, replace(W4, format=WeightFormat(4, 16)), FLOAT)
    quantize_dequantize(canonical, Quantization({}, linears))
    if dtype == torch.float16:
        half_precision(canonical, dtype)
    remove_dead_code(canonical)
    write_model(canonical, tmp_path)
    found = audit(tmp_path / GRAPH_FILE, linears, "onnx")
    assert [tensor.bits for tensor in found if tensor.form == "float"] == [
        8 * dtype.itemsize
    ] * CONFIG.num_layers
    assert {tensor.operator for tensor in found} == {"MatMul"}
    for name, how in linears.items():
        with pytest.raises(GraphError, match=rf"{name} was to be"):
            audit(tmp_path / GRAPH_FILE, {**linears, name: ROWS if how.form != "w8" else TENSOR}, "onnx")
