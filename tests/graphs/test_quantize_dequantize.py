"""Codes in standard operators: what they say, where they stand, and what is refused."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator
from support.dequantized import (
    HOW,
    LAYERS,
    LINEARS,
    ROWS,
    TABLE,
    each_form,
    for_all,
    nodes,
    product_of,
    quantized,
)
from support.graphs import MakeGraph, canonical, decoder_feeds, run
from support.quantized_tiny import relative_error

from gemma_export.errors import GraphError
from gemma_export.graphs import schedule
from gemma_export.graphs.formats import WeightFormat
from gemma_export.graphs.passes.half_precision import half_precision
from gemma_export.graphs.passes.quantize_dequantize import CODE_STEP, quantize_dequantize, rounded_scale
from gemma_export.graphs.quantization import (
    LinearQuantization,
    Quantization,
    decode,
    encode,
    round_per_tensor,
    round_trip,
    scales_for,
)
from gemma_export.graphs.storage import write_model
from gemma_export.graphs.tensors import InMemory, streamed

# What it says


def rounded_by_hand(model: ir.Model, quantization: Quantization) -> None:
    """The same rounding spelt otherwise: of weights before, of activations by Div, Round and Clip."""
    graph = model.graph
    for value in list(graph.initializers.values()):
        how = quantization.linears.get(str(value.name).removesuffix(".weight"))
        tensor = streamed(value)
        if how is None or how.format is None or tensor is None:
            continue
        weight = tensor.source.read(0, tensor.source.shape[0])
        value.const_value = ir.tensor(round_trip(weight, how.format, how.rounding), name=value.name)
        if how.activation_scale is None:
            continue
        (transpose,) = (use.node for use in value.uses())
        (product,) = (use.node for use in transpose.outputs[0].uses())
        step, low, high = (
            ir.Value(
                name=f"{value.name}.{i}", const_value=ir.tensor(np.float32(number), name=f"{value.name}.{i}")
            )
            for i, number in enumerate((rounded_scale(how.activation_scale), -128, 127))
        )
        for constant in (step, low, high):
            graph.register_initializer(constant)
        chain = [ir.node("Div", [product.inputs[0], step])]
        chain.append(ir.node("Round", [chain[-1].outputs[0]]))
        chain.append(ir.node("Clip", [chain[-1].outputs[0], low, high]))
        chain.append(ir.node("Mul", [chain[-1].outputs[0], step]))
        graph.insert_before(product, chain)
        product.replace_input_with(0, chain[-1].outputs[0])


@each_form
def test_the_decoder_says_what_its_rounded_numbers_say(raw_graph: MakeGraph, form: str) -> None:
    quantization = for_all(HOW[form])
    expected, model = canonical(raw_graph), quantized(raw_graph, quantization)
    plain = run(canonical(raw_graph), feeds := decoder_feeds(expected, batch=2, tokens=4, start=3))
    rounded_by_hand(expected, quantization)
    wanted, found = run(expected, feeds), run(model, feeds)
    for name, values in wanted.items():
        # Sums of at most 64 terms in fp32, one after another through two layers. A rounding that falls to
        # the other side would show as a thousand times this.
        assert relative_error(found[name], values) < 3e-6, name
    assert relative_error(found["logits"], plain["logits"]) > 1e-3, "nothing was rounded"


@settings(max_examples=30, deadline=None)
@given(
    form=st.sampled_from(sorted(HOW)),
    seed=st.integers(0, 2**16),
    columns=st.sampled_from([16, 48, 160]),
    magnitude=st.integers(-12, 12),
    saturates=st.booleans(),
)
def test_a_product_is_that_of_the_rounded_numbers(
    form: str, seed: int, columns: int, magnitude: int, saturates: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    # Rows of different size, so that one row's scale would be wrong for another.
    sizes = 2.0 ** torch.randint(-6, 6, (5, 1), generator=generator)
    weight = torch.randn(5, columns, generator=generator) * sizes * 2.0**magnitude
    x = torch.randn(3, columns, generator=generator) * 2.0**-magnitude
    how = HOW[form]
    if how.activation_scale is not None:
        scale = float(x.abs().max()) / 127
        how = replace(how, activation_scale=scale / 500 if saturates else scale)
    (found,) = run(product_of(weight, how), {"x": x.numpy()}).values()
    assert how.format is not None
    rounded = x if how.activation_scale is None else round_per_tensor(x, rounded_scale(how.activation_scale))
    stored = round_trip(weight, how.format, how.rounding)
    expected = rounded.double() @ stored.double().T
    # Of the sum of magnitudes: 160 terms, each rounded once, and the sum after each.
    bound = 1e-5 * (rounded.double().abs() @ stored.double().abs().T)
    assert (torch.from_numpy(found) - expected).abs().le(bound).all()


def test_a_scale_that_is_too_small_saturates() -> None:
    how = LinearQuantization("w8a8-tensor", ROWS, activation_scale=2.0**-20)
    model = product_of(torch.eye(4), how)
    x = np.array([[1, -1, 2.0**-20, 0]] * 3, np.float32)
    (found,) = run(model, {"x": x}).values()
    # The scale is a power of two, and a row of the unit matrix is the code 127 times a 127th.
    np.testing.assert_allclose(found[0] * 2.0**20, [127, -128, 1, 0], rtol=1e-6)


def test_codes_that_were_chosen_one_by_one_are_taken() -> None:
    weight, form = torch.randn(3, 32, generator=torch.Generator().manual_seed(5)), WeightFormat(4, 16)
    scales = scales_for(weight, form, "nearest")
    codes = encode(weight, scales, form)
    codes[0, 0] = -codes[0, 0]  # Calibration may choose otherwise than rounding does.
    stored = (InMemory("codes", codes), InMemory("scales", scales))
    model = product_of(weight, LinearQuantization("w4", form, stored=stored))
    x = np.eye(3, 32, dtype=np.float32)
    (found,) = run(model, {"x": x}).values()
    np.testing.assert_array_equal(found, decode(codes, scales, form)[:, :3].T.numpy())


@given(st.floats(2.0**-100, 2.0**100))
def test_the_scale_of_an_activation_has_a_few_digits_and_clips_nothing(scale: float) -> None:
    rounded = rounded_scale(scale)
    assert scale <= rounded <= scale * (1 + 2.0**-7)
    assert float(ml_dtypes.bfloat16(rounded)) == rounded
    assert rounded_scale(rounded) == rounded


# The graph


@each_form
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"]
)
def test_the_checker_has_nothing_to_say(
    raw_graph: MakeGraph, form: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = quantized(raw_graph, for_all(HOW[form]))
    if dtype != torch.float32:
        half_precision(model, dtype)
        schedule.remove_dead_code(model)
    write_model(model, tmp_path)
    onnx.checker.check_model(str(tmp_path / "model.onnx"), full_check=True)
    written = onnx.load(tmp_path / "model.onnx")
    assert {(entry.domain, entry.version) for entry in written.opset_import} == {("", 24)}
    assert {node.domain for node in written.graph.node} == {""}


@each_form
def test_the_specification_reads_what_is_written_as_onnxruntime_does(
    raw_graph: MakeGraph, form: str, tmp_path: Path
) -> None:
    model = quantized(raw_graph, for_all(HOW[form]))
    feeds = decoder_feeds(model, batch=1, tokens=3, start=2)
    expected = run(model, feeds)
    write_model(model, tmp_path)
    evaluator = ReferenceEvaluator(str(tmp_path / "model.onnx"))
    for name, values in zip(evaluator.output_names, evaluator.run(None, feeds), strict=True):
        assert relative_error(values, expected[name]) < 3e-6, name


def test_one_table_of_codes_serves_the_lookup_and_the_head(raw_graph: MakeGraph) -> None:
    model = quantized(raw_graph, for_all(HOW["w8"]))
    tables = {
        name: value.dtype
        for name, value in model.graph.initializers.items()
        if value.shape is not None and list(value.shape) == [96, 32]
    }
    # gate_up_proj happens to have the table's shape.
    assert tables.pop("embed_tokens.codes") == ir.DataType.INT8
    assert set(tables) == {f"layers.{i}.mlp.gate_up_proj.codes" for i in range(LAYERS)} | {
        f"layers.{i}.self_attn.qkv_proj.codes" for i in range(LAYERS)
    }
    (numbers,) = (use.node for use in model.graph.initializers["embed_tokens.codes"].uses())
    assert sorted(use.node.op_type for use in numbers.outputs[0].uses()) == ["Gather", "Transpose"]
    readers = [use.node.op_type for use in model.graph.initializers["embed_tokens.scales"].uses()]
    assert sorted(readers) == ["Gather", "Mul"]
    assert not [name for name in model.graph.initializers if name.endswith(".weight")]


def test_codes_of_8_bits_have_one_step_and_feed_nothing_but_their_numbers(raw_graph: MakeGraph) -> None:
    # TensorRT makes a weight with a scale per row in DequantizeLinear wide in memory, on every call.
    model = quantized(raw_graph, for_all(HOW["w8a8-tensor"]))
    for name, value in model.graph.initializers.items():
        if not name.endswith(".codes"):
            continue
        (node,) = (use.node for use in value.uses())
        step = node.inputs[1]
        assert node.op_type == "DequantizeLinear"
        assert step is model.graph.initializers["code_step"]
    step = model.graph.initializers["code_step"].const_value
    assert step is not None
    assert step.numpy() == CODE_STEP == np.finfo(np.float16).smallest_normal


def test_names_stay_with_the_finished_product(raw_graph: MakeGraph) -> None:
    model = quantized(raw_graph, for_all(HOW["w8"]))
    for name in [*LINEARS, "embed_tokens", "logits"]:
        (node,) = (node for node in model.graph if node.outputs[0].name == name)
        assert node.op_type == "Mul", name


def test_a_float_layer_is_left_alone(raw_graph: MakeGraph) -> None:
    floats = LinearQuantization("float")
    model, untouched = canonical(raw_graph), canonical(raw_graph)
    assert quantize_dequantize(model, for_all(floats, embed_tokens=floats)) == 0
    assert quantize_dequantize(model, for_all(HOW["w8"], down_proj=floats)) == LAYERS * 3 + 1
    schedule.remove_dead_code(model)
    assert {name for name in model.graph.initializers if name.endswith(".weight")} == {
        f"layers.{i}.mlp.down_proj.weight" for i in range(LAYERS)
    }
    assert len(nodes(untouched, "MatMul")) == len(nodes(model, "MatMul"))


@each_form
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_the_lowered_graph_keeps_its_rules(raw_graph: MakeGraph, form: str, dtype: torch.dtype) -> None:
    model = canonical(raw_graph)
    quantization = for_all(HOW[form], o_proj=LinearQuantization("float"))
    report = schedule.lower(model, "onnx", torch.float16, dtype, quantization=quantization)
    assert report["quantize_dequantize"] == LAYERS * 3 + 1


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a layer that is not named": ({"o_proj": None}, "layers.0.self_attn.o_proj"),
    "a table that is not named": ({"embed_tokens": None}, "embed_tokens"),
    "a scale per token": ({"o_proj": LinearQuantization("w8a8-token", ROWS)}, "layers.0.self_attn.o_proj"),
    "8 bits in blocks": ({"o_proj": LinearQuantization("w8", WeightFormat(8, 16))}, "blocks of 16"),
    "4 bits by rows": ({"o_proj": LinearQuantization("w4", WeightFormat(4))}, "a scale per row"),
    "4 bits where 8 belong": ({"o_proj": LinearQuantization("w8", WeightFormat(4, 16))}, "4 bits"),
    "no format": ({"o_proj": LinearQuantization("w8")}, "no format"),
    "negative scales": (
        {"o_proj": LinearQuantization("w4", WeightFormat(4, 16, negative_scales=True))},
        "may be negative",
    ),
    "a table in 4 bits": ({"embed_tokens": LinearQuantization("w4", WeightFormat(4, 16))}, "8 bits"),
    "blocks that do not divide": ({"down_proj": LinearQuantization("w4", WeightFormat(4, 32))}, "down_proj"),
    "no scale of the activation": ({"o_proj": LinearQuantization("w8a8-tensor", ROWS)}, "None"),
} | {
    f"a scale of {scale}": (
        {"o_proj": LinearQuantization("w8a8-tensor", ROWS, activation_scale=scale)},
        str(scale),
    )
    for scale in (0.0, -1.0, math.inf, math.nan)
}


@pytest.mark.parametrize(("others", "says"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_built_is_refused_by_name(
    raw_graph: MakeGraph, others: dict[str, Any], says: str
) -> None:
    with pytest.raises(GraphError) as error:
        quantize_dequantize(canonical(raw_graph), for_all(HOW["w8"], **others))
    assert says in error.value.message
    named = {"o_proj": "layers.0.self_attn.o_proj", "down_proj": "layers.0.mlp.down_proj"}
    assert named.get(*others, *others) in error.value.message


def test_a_layer_that_is_not_there_is_refused(raw_graph: MakeGraph) -> None:
    linears = {**for_all(HOW["w8"]).linears, "layers.2.mlp.down_proj": TABLE}
    with pytest.raises(GraphError, match=r"layers\.2\.mlp\.down_proj"):
        quantize_dequantize(canonical(raw_graph), Quantization({}, linears))
