"""The audit, on graphs made by hand of which one part at a time is not what was asked for.

Asked for is a table that is looked up, a layer of each form, and a head over the table.
"""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from ml_dtypes import bfloat16
from onnx import TensorProto
from support.audit_parts import (
    BLOCK,
    CPU,
    CPU_PARTS,
    ONNX,
    ONNX_PARTS,
    D,
    Graph,
    V,
    behind,
    blocks,
    half,
    lookup,
    nibbles,
    rounded,
    rounded_tokens,
    write,
)

from gemma_export.errors import GraphError
from gemma_export.exporter import audit as audit_module
from gemma_export.exporter.audit import AuditedTensor, audit, optimized
from gemma_export.graphs.storage import DATA_FILE


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
