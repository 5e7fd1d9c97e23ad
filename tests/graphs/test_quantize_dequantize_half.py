"""Codes in standard operators with 16-bit arithmetic: the graph, and its twin that a CPU can measure."""

from collections.abc import Collection
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from support.dequantized import (
    HOW,
    LAYERS,
    LINEARS,
    TABLE,
    each_form,
    for_all,
    nodes,
    product_of,
    quantized,
)
from support.graphs import Array, MakeGraph, decoder_feeds, producer, run
from support.quantized_tiny import relative_error

from gemma_export.graphs import schedule
from gemma_export.graphs.formats import Form
from gemma_export.graphs.passes.emulate_half import emulate_half
from gemma_export.graphs.passes.half_precision import half_precision
from gemma_export.graphs.passes.quantize_dequantize import CODE_STEP
from gemma_export.graphs.quantization import (
    LinearQuantization,
    decode,
    encode,
    round_per_tensor,
    round_trip,
    scales_for,
)

# In 16 bits


def in_half(raw_graph: MakeGraph, form: str, keep: Collection[str] = ()) -> ir.Model:
    model = quantized(raw_graph, for_all(HOW[form]))
    half_precision(model, torch.float16, keep)
    schedule.remove_dead_code(model)
    return model


def formats_by_name(model: ir.Model) -> dict[str | None, ir.DataType | None]:
    values = {value.name: value.dtype for value in model.graph.initializers.values()}
    return values | {value.name: value.dtype for node in model.graph for value in node.outputs}


@each_form
def test_everything_but_the_codes_is_16_bits_wide(raw_graph: MakeGraph, form: str) -> None:
    model = in_half(raw_graph, form)
    formats = formats_by_name(model)
    for name in LINEARS:
        assert formats[f"{name}.codes"] == (ir.DataType.INT4 if form == "w4" else ir.DataType.INT8)
        assert formats[f"{name}.scales"] == formats[f"{name}.numbers"] == formats[name] == ir.DataType.FLOAT16
    assert formats["embed_tokens.scales"] == formats["embed_tokens.numbers"] == ir.DataType.FLOAT16
    # Rows that were looked up and the residual stream are an island, as in any 16-bit graph.
    assert formats["embed_tokens"] == ir.DataType.FLOAT
    floats = {ir.DataType.FLOAT, ir.DataType.FLOAT16}
    for node in model.graph:
        operands = {value.dtype for value in node.inputs if value is not None} & floats
        assert len(operands) <= 1, f"{node.op_type} mixes formats"


def test_activations_are_rounded_in_fp32_with_the_scale_they_are_multiplied_with(
    raw_graph: MakeGraph,
) -> None:
    model = in_half(raw_graph, "w8a8-tensor")
    assert len(nodes(model, "QuantizeLinear")) == 4 * LAYERS
    for quantize in nodes(model, "QuantizeLinear"):
        (numbers,) = (use.node for use in quantize.outputs[0].uses())
        x, (wide, narrow) = quantize.inputs[0], (quantize.inputs[1], numbers.inputs[1])
        assert x is not None
        assert wide is not None
        assert narrow is not None
        assert wide.const_value is not None
        assert narrow.const_value is not None
        assert (x.dtype, wide.dtype, narrow.dtype) == (
            ir.DataType.FLOAT,
            ir.DataType.FLOAT,
            ir.DataType.FLOAT16,
        )
        assert float(wide.const_value.numpy()) == float(narrow.const_value.numpy())
    # A norm is in fp32 already: nothing stands between it and what rounds it.
    (first, *_) = nodes(model, "QuantizeLinear")
    assert producer(first.inputs[0]).op_type == "RMSNormalization"


@each_form
def test_what_leaves_fp16_is_an_island_and_no_weight_is_cast(raw_graph: MakeGraph, form: str) -> None:
    keep = {"layers.0.mlp.gated", "layers.1.self_attn.o_proj", "layers.1.mlp.down_proj.scales"}
    model = in_half(raw_graph, form, keep)
    formats = formats_by_name(model)
    wide = ir.DataType.FLOAT
    # The activation is kept: what reads it is wide, and so are the numbers that it is multiplied with.
    assert formats["layers.0.mlp.gated"] == formats["layers.0.mlp.down_proj"] == wide
    assert formats["layers.0.mlp.down_proj.numbers"] == wide
    # Its scales are kept.
    assert formats["layers.1.mlp.down_proj.scales"] == formats["layers.1.mlp.down_proj"] == wide
    # The product is kept: the sum over codes of 8 bits stays within fp16, and its factor takes it out.
    assert formats["layers.1.self_attn.o_proj"] == wide
    assert formats["layers.1.self_attn.o_proj.numbers"] == (wide if form == "w4" else ir.DataType.FLOAT16)
    assert formats["layers.0.self_attn.o_proj"] == ir.DataType.FLOAT16
    codes = {value for name, value in model.graph.initializers.items() if name.endswith(".codes")}
    for cast in nodes(model, "Cast"):
        value = cast.inputs[0]
        while value is not None and (node := value.producer()) is not None and node.op_type != "Gather":
            value = node.inputs[0] if node.op_type in ("Transpose", "DequantizeLinear") else None
        assert value not in codes, cast.outputs[0].name


# The twin


def in_one_product(weight: torch.Tensor, how: LinearQuantization) -> ir.Model:
    model = product_of(weight, how)
    half_precision(model, torch.float16)
    schedule.remove_dead_code(model)
    return model


def run_optimized(model: ir.Model, x: npt.NDArray[np.float32]) -> Array:
    """By onnxruntime with all that it does to a graph, as a bundle is run."""
    session = onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    found: Array = session.run(None, {"x": x})[0]
    return found


def rounded_to_half(x: torch.Tensor) -> torch.Tensor:
    return x.half().float()


@each_form
@pytest.mark.parametrize("optimized", [False, True], ids=["as written", "optimized"])
def test_the_twin_rounds_where_16_bits_do(form: Form, optimized: bool) -> None:
    # Few enough digits for every sum to be exact in fp32, whatever its order: 7 of x, 8 of the codes (of 4
    # bits with their scale 11), 6 of 48 terms.
    generator = torch.Generator().manual_seed(3)
    x = torch.randint(-60, 61, (3, 48), generator=generator) / 16
    weight = torch.randn(40, 48, generator=generator) * 2.0 ** torch.randint(
        -6, 2, (40, 1), generator=generator
    )
    how = HOW[form]
    if how.activation_scale is not None:
        how = replace(how, activation_scale=2.0**-5)
    model = in_one_product(weight, how)
    emulate_half(model)
    found = run_optimized(model, x.numpy()) if optimized else run(model, {"x": x.numpy()})["y"]

    assert how.format is not None
    scales = scales_for(weight, how.format, how.rounding)
    codes = encode(weight, scales, how.format)
    if form == "w4":
        numbers = rounded_to_half(decode(codes, rounded_to_half(scales), how.format))
        expected = rounded_to_half(x @ numbers.T)
    else:
        rounded = x if how.activation_scale is None else round_per_tensor(x, how.activation_scale)
        sums = rounded_to_half(rounded @ (codes * CODE_STEP).T)
        expected = rounded_to_half(sums * rounded_to_half(scales[:, 0] / CODE_STEP))
    np.testing.assert_array_equal(found, expected.numpy())
    exact = x.double() @ round_trip(weight, how.format, how.rounding).double().T
    assert (found != exact.float().numpy()).mean() > 0.5, "nothing was rounded"


def test_the_twin_adds_no_rounding_to_codes_of_activations(raw_graph: MakeGraph) -> None:
    # A device multiplies the codes themselves.
    model = in_half(raw_graph, "w8a8-tensor")
    emulate_half(model)
    products = [node for node in nodes(model, "MatMul") if str(node.name).startswith("layers.")]
    assert len(products) == 4 * LAYERS
    for product in products:
        numbers = producer(product.inputs[0])
        assert numbers.op_type == "DequantizeLinear"
        assert producer(numbers.inputs[0]).op_type == "QuantizeLinear"


@each_form
def test_the_twin_of_the_decoder_is_near_its_fp32_graph(raw_graph: MakeGraph, form: str) -> None:
    reference, twin = quantized(raw_graph, for_all(HOW[form])), in_half(raw_graph, form)
    emulate_half(twin)
    feeds = decoder_feeds(reference, batch=1, tokens=3, start=2)
    error = relative_error(run(twin, feeds)["logits"], run(reference, feeds)["logits"])
    # 2^-11 per rounding, a few tens of them: half a percent. Where activations are rounded to 8 bits, each of
    # those that falls to the other side is a hundredth of the largest.
    assert 1e-5 < error < (2e-2 if form == "w8a8-tensor" else 5e-3)


def test_sums_stay_within_fp16_whatever_the_weights() -> None:
    # All of one sign, and every code the largest: nothing makes a larger sum.
    generator = torch.Generator().manual_seed(1)
    sizes = 10.0 ** torch.randint(-6, 1, (8, 1), generator=generator)
    model = in_one_product(sizes.expand(8, 16384).contiguous(), TABLE)
    x = np.full((3, 16384), 511, np.float32)
    emulate_half(model)
    wanted = (511 * 16384 * sizes[:, 0]).numpy()
    found = run(model, {"x": x})["y"]
    beyond = wanted > np.finfo(np.float16).max
    assert 0 < beyond.sum() < 8
    np.testing.assert_allclose(
        found[:, ~beyond], np.broadcast_to(wanted[~beyond], (3, 8 - beyond.sum())), rtol=2e-3
    )
    assert np.isinf(found[:, beyond]).all()
    # Where the range audit sees that, the layer is kept, and is right.
    kept = product_of(sizes.expand(8, 16384).contiguous(), TABLE)
    half_precision(kept, torch.float16, {"y"})
    schedule.remove_dead_code(kept)
    emulate_half(kept)
    np.testing.assert_allclose(run(kept, {"x": x})["y"], np.broadcast_to(wanted, (3, 8)), rtol=2e-3)
