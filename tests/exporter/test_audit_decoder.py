"""The audit, on graphs of the small decoder as the passes make them."""

from dataclasses import replace
from pathlib import Path

import onnx_ir as ir
import pytest
import torch
from support.audit_parts import FLOAT, ROWS, TENSOR, TOKEN, W4, W8
from support.graphs import cloned, random_weights, small_config

from gemma_export.errors import GraphError
from gemma_export.exporter.audit import audit
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
from gemma_export.graphs.storage import GRAPH_FILE, write_model

CONFIG = small_config(num_layers=2)
SMALL_BLOCKS = WeightFormat(8, 16)


@pytest.fixture(scope="module")
def traced() -> ir.Model:
    return trace(CONFIG, 16)


@pytest.fixture
def canonical(traced: ir.Model) -> ir.Model:
    model = cloned(traced)
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
