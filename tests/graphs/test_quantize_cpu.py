"""The quantized graph for a CPU: its operators, their names and formats, and its bytes."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from support.graphs import MakeGraph, canonical, decoder_feeds, run
from support.quantized_cpu import (
    FLOAT,
    FP16,
    FP32,
    LAYERS,
    TOKEN,
    W4,
    W8,
    forms,
    numbers_of,
    operators,
    small,
)
from support.quantized_tiny import Array, every_layer, tiny_canonical, tiny_feeds, tiny_source

from gemma_export.graphs import schedule
from gemma_export.graphs.formats import WeightFormat
from gemma_export.graphs.quantization import LinearQuantization, Quantization, round_trip
from gemma_export.graphs.storage import (
    ALIGNMENT,
    DATA_FILE,
    GRAPH_FILE,
    INLINE_BYTES,
    external_bytes,
    write_model,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    "how",
    [LinearQuantization("w8", WeightFormat(8, 128)), LinearQuantization("w4", WeightFormat(4, 128))],
    ids=lambda how: how.form,
)
def test_scales_are_made_wide_once_when_the_graph_is_loaded(how: LinearQuantization, tmp_path: Path) -> None:
    model = tiny_canonical()
    schedule.lower(model, "cpu", FP32, FP32, quantization=every_layer(how))
    write_model(model, tmp_path)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(tmp_path / "as_run.onnx")
    ort.InferenceSession(str(tmp_path / GRAPH_FILE), options, providers=["CPUExecutionProvider"])
    as_run = ir.load(tmp_path / "as_run.onnx").graph
    products = [node for node in as_run if node.op_type == "MatMulNBits"]
    assert len(products) == operators(model)["MatMulNBits"]
    for product in products:
        scales = product.inputs[2]
        assert scales is not None
        # Of anything but a constant onnxruntime packs none, and its products are zeros.
        assert scales.is_initializer(), product.name
        assert scales.dtype == ir.DataType.FLOAT


@forms
def test_each_pass_reports_what_it_did(raw_graph: MakeGraph, how: LinearQuantization) -> None:
    model = canonical(raw_graph)
    smoothing = {"layers.1.input_layernorm": torch.full((32,), 2.0)}
    quantization = Quantization(smoothing, small(how, o_proj=FLOAT).linears)
    report = schedule.lower(model, "cpu", FP16, FP32, quantization=quantization)
    del report["remove_dead_code"]
    assert report == {
        "fold_channel_scales": 1,
        "lower_group_query_attention": LAYERS,
        "quantize_linear": 3 * LAYERS,
        "quantize_embedding": 1,
        "lower_linear": LAYERS,
        "fuse_gated_gelu": LAYERS,
        "fuse_residual_norm": 2 * LAYERS,
        "compute_rotary_tables": 2,
        "store_half": LAYERS,
    }


def test_layers_may_differ(raw_graph: MakeGraph) -> None:
    model = canonical(raw_graph)
    quantization = small(TOKEN, qkv_proj=W8, down_proj=W4, o_proj=FLOAT)
    schedule.lower(model, "cpu", FP16, FP32, quantization=quantization)
    counts = operators(model)
    assert counts["MatMulInteger"] == counts["QuantizeLinear"] == LAYERS
    assert counts["MatMulNBits"] == 2 * LAYERS + 1
    assert counts["FusedMatMul"] == LAYERS
    formats = {name: value.dtype.name for name, value in model.graph.initializers.items() if value.dtype}
    assert {name: formats[name] for name in formats if name.startswith(("layers.1", "embed"))} == {
        "layers.1.input_layernorm.gain": "FLOAT",
        "layers.1.post_attention_layernorm.gain": "FLOAT",
        "layers.1.self_attn.qkv_proj.codes": "UINT8",
        "layers.1.self_attn.qkv_proj.scales": "BFLOAT16",
        "layers.1.self_attn.o_proj.weight": "FLOAT16",
        "layers.1.mlp.gate_up_proj.codes": "INT8",
        "layers.1.mlp.gate_up_proj.scales": "FLOAT",
        "layers.1.mlp.down_proj.codes": "UINT8",
        "layers.1.mlp.down_proj.scales": "BFLOAT16",
        "embed_tokens.codes": "UINT8",
        "embed_tokens.scales": "BFLOAT16",
    }


def test_every_value_of_a_product_is_named_after_it(raw_graph: MakeGraph) -> None:
    model = canonical(raw_graph)
    schedule.lower(model, "cpu", FP32, FP32, quantization=small(TOKEN))
    product = next(node for node in model.graph if node.op_type == "MatMulInteger")
    assert product.name == "layers.0.self_attn.qkv_proj.sums"
    names = [node.name for node in model.graph if node.op_type in ("MatMulNBits", "Mul")]
    assert {"layers.1.mlp.down_proj", "logits"} <= set(names)


def test_a_kept_weight_of_a_16_bit_layer_stays_in_fp32(raw_graph: MakeGraph) -> None:
    model = canonical(raw_graph)
    keep = {"layers.0.self_attn.o_proj.weight"}
    schedule.lower(model, "cpu", FP16, FP32, keep, small(TOKEN, o_proj=FLOAT))
    formats = [model.graph.initializers[f"layers.{i}.self_attn.o_proj.weight"].dtype for i in range(LAYERS)]
    assert formats == [ir.DataType.FLOAT, ir.DataType.FLOAT16]


def test_the_table_is_looked_up_as_the_head_reads_it(raw_graph: MakeGraph) -> None:
    model, plain = canonical(raw_graph), canonical(raw_graph)
    table = numbers_of(plain, "embed_tokens")
    schedule.lower(model, "cpu", FP32, FP32, quantization=small(TOKEN))
    made = {value.name: value for node in model.graph for value in node.outputs}
    scaled = made["embed_tokens"].uses()[0].node  # type: ignore[index]
    assert scaled.op_type == "Mul"
    assert scaled.inputs[1] is not None
    assert float(scaled.inputs[1].const_value.numpy()) == pytest.approx(32**0.5)  # type: ignore[union-attr]
    model.graph.outputs.append(made["embed_tokens"])
    feeds = decoder_feeds(plain, batch=2, tokens=5, start=0)
    found = run(model, feeds)["embed_tokens"]
    assert W8.format is not None
    np.testing.assert_array_equal(found, round_trip(table, W8.format)[torch.from_numpy(feeds["input_ids"])])


@pytest.mark.parametrize(
    "how",
    [
        TOKEN,
        LinearQuantization("w8", WeightFormat(8)),
        LinearQuantization("w8", WeightFormat(8, 64)),
        LinearQuantization("w4", WeightFormat(4, 32)),
    ],
    ids=["tokens", "w8", "w8 64", "w4"],
)
def test_the_file_holds_every_byte_once(how: LinearQuantization, tmp_path: Path) -> None:
    model = tiny_canonical()
    schedule.lower(model, "cpu", FP16, FP32, quantization=every_layer(how, o_proj=FLOAT))
    feeds = tiny_feeds(tokens=2)
    expected = run(model, feeds)["logits"]
    wanted = expected_sizes(how)
    assert external_bytes(model) == padded(wanted)
    files = write_model(model, tmp_path)
    assert files[DATA_FILE].size == (tmp_path / DATA_FILE).stat().st_size == padded(wanted)
    np.testing.assert_array_equal(bound_logits(tmp_path / GRAPH_FILE, feeds), expected)


def expected_sizes(how: LinearQuantization) -> list[int]:
    """Bytes of every stored tensor of the model that ships, from its shape alone."""
    config = tiny_source().config
    d, f, heads = config.hidden_size, config.intermediate_size, config.num_query_heads * config.head_dim
    kv = config.num_kv_heads * config.head_dim
    sizes = []  # Gains and the frequencies of the rotary tables are in the graph file.
    for rows, columns in [(heads + 2 * kv, d), (2 * f, d), (d, f)] * config.num_layers:
        sizes += expected_parts(how, rows, columns)
    sizes += [d * heads * 2] * config.num_layers  # In fp16.
    return [*sizes, *expected_parts(every_layer(how).linears["embed_tokens"], config.vocab_size, d)]


def expected_parts(how: LinearQuantization, rows: int, columns: int) -> list[int]:
    """Bytes of a weight's codes and of its scales."""
    assert how.format is not None
    scale = 4 if how.format.block is None else 2
    return [rows * columns * how.format.bits // 8, rows * how.format.groups(columns) * scale]


def padded(sizes: list[int]) -> int:
    """Size of a file whose last tensor is the table's scales, with every tensor at a page."""
    stored = [size for size in sizes if size > INLINE_BYTES]
    return sum(-(-size // ALIGNMENT) * ALIGNMENT for size in stored[:-1]) + stored[-1]


def bound_logits(graph: Path, feeds: Mapping[str, np.ndarray]) -> Array:
    """Logits by way of IOBinding, from the files, without fusions as `run`."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.log_severity_level = 3
    session = ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    for name, values in feeds.items():
        binding.bind_cpu_input(name, values)
    for output in session.get_outputs():
        binding.bind_output(output.name)
    session.run_with_iobinding(binding)
    logits: Array = binding.copy_outputs_to_cpu()[0]
    return logits
