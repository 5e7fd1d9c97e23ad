"""Storing and computing in 16 bits."""

import numpy as np
import onnx_ir as ir
import pytest
import torch
from support.graphs import MakeGraph, canonical, decoder_feeds, run

from gemma_export.graphs import schedule
from gemma_export.graphs.passes.half_precision import ALWAYS_FP32, half_precision
from gemma_export.graphs.passes.store_half import store_half
from gemma_export.graphs.tensors import streamed

FORMATS = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
LAYERS = 2
MATRICES = 4 * LAYERS + 1


@FORMATS
def test_storage_holds_every_matrix_and_no_gain_in_16_bits(raw_graph: MakeGraph, dtype: torch.dtype) -> None:
    model = canonical(raw_graph)
    assert store_half(model, dtype) == MATRICES
    for name, value in model.graph.initializers.items():
        tensor = streamed(value)
        if tensor is None:
            continue
        narrow = not name.endswith(".gain") and not name.startswith("rotary_")
        assert tensor.source.dtype == (dtype if narrow else torch.float32), name


@FORMATS
def test_stored_weights_are_the_rounded_ones_and_nothing_else_changes(
    raw_graph: MakeGraph, dtype: torch.dtype
) -> None:
    stored, rounded = canonical(raw_graph), canonical(raw_graph)
    store_half(stored, dtype)
    for value in rounded.graph.initializers.values():
        tensor = streamed(value)
        if tensor is not None and not str(value.name).endswith(".gain") and "rotary" not in str(value.name):
            narrow = tensor.source.read(0, tensor.source.shape[0]).to(dtype).float()
            value.const_value = ir.tensor(narrow, name=value.name)
    feeds = decoder_feeds(stored, batch=1, tokens=3, start=2)
    for mine, expected in zip(run(stored, feeds).values(), run(rounded, feeds).values(), strict=True):
        np.testing.assert_array_equal(mine, expected)


def test_a_weight_that_is_kept_stays_in_fp32(raw_graph: MakeGraph) -> None:
    model = canonical(raw_graph)
    assert store_half(model, torch.float16, {"layers.1.mlp.down_proj.weight"}) == MATRICES - 1
    assert model.graph.initializers["layers.1.mlp.down_proj.weight"].dtype == ir.DataType.FLOAT


@FORMATS
def test_computing_in_16_bits_leaves_the_islands(raw_graph: MakeGraph, dtype: torch.dtype) -> None:
    model = canonical(raw_graph)
    half_precision(model, dtype)
    half = ir.DataType.FLOAT16 if dtype == torch.float16 else ir.DataType.BFLOAT16
    for node in model.graph:
        output = node.outputs[0].dtype
        if node.op_type in ALWAYS_FP32:
            assert output == ir.DataType.FLOAT, node.op_type
        elif node.op_type in ("MatMul", "Attention", "TensorScatter") and output != ir.DataType.INT64:
            assert output == half, node.op_type
        operands = {value.dtype for value in node.inputs if value is not None} & {half, ir.DataType.FLOAT}
        assert len(operands) <= 1, f"{node.op_type} mixes formats"
    assert [value.dtype for value in model.graph.outputs] == [ir.DataType.FLOAT, *[half] * (2 * LAYERS)]


def test_what_is_kept_is_an_island(raw_graph: MakeGraph) -> None:
    model = canonical(raw_graph)
    half_precision(model, torch.float16, {"layers.0.mlp.down_proj", "layers.1.self_attn.o_proj.weight"})
    formats = {value.name: value.dtype for node in model.graph for value in node.outputs}
    assert formats["layers.0.mlp.down_proj"] == ir.DataType.FLOAT
    assert formats["layers.1.mlp.down_proj"] == ir.DataType.FLOAT16
    # A weight beyond the range is stored in fp32, and what reads it computes so.
    assert model.graph.initializers["layers.1.self_attn.o_proj.weight"].dtype == ir.DataType.FLOAT
    assert formats["layers.1.self_attn.o_proj"] == ir.DataType.FLOAT
    assert model.graph.initializers["layers.0.mlp.down_proj.weight"].dtype == ir.DataType.FLOAT16


def test_the_masks_minimum_is_finite_in_fp16(raw_graph: MakeGraph) -> None:
    model = canonical(raw_graph)
    half_precision(model, torch.float16)
    where = next(node for node in model.graph if node.op_type == "Where")
    minimum = where.inputs[2]
    assert minimum is not None
    assert minimum.const_value is not None
    assert float(minimum.const_value.numpy()) == float(np.finfo(np.float16).min)


def test_fp16_stays_near_fp32(raw_graph: MakeGraph) -> None:
    reference, half = canonical(raw_graph), canonical(raw_graph)
    half_precision(half, torch.float16)
    schedule.remove_dead_code(half)
    feeds = decoder_feeds(reference, batch=1, tokens=3, start=2)
    narrow = {
        name: value.astype(np.float16) if value.dtype == np.float32 else value
        for name, value in feeds.items()
    }
    expected, logits = run(reference, feeds)["logits"], run(half, narrow)["logits"]
    # 2^-11 per rounding, a few tens of them: half a percent of the largest logit, and far from zero error.
    error = float(np.abs(expected - logits).max() / np.abs(expected).max())
    assert 1e-5 < error < 5e-3
