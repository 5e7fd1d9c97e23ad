"""Gemma 2's graph: a mask for each kind of layer, capped attention, four norms a layer, capped logits."""

from collections import Counter
from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest
import torch
from support.graphs import decoder_feeds, random_weights, run
from support.second_generation import CONFIG, SLOTS, WINDOW, canonical_graph, of_type, raw_graph

from gemma_export.errors import GraphError
from gemma_export.exporter.decoder import Decoder, rotary_tables
from gemma_export.graphs import schedule
from gemma_export.graphs.passes.fold_channel_scales import fold_channel_scales
from gemma_export.graphs.passes.half_precision import half_precision
from gemma_export.graphs.passes.lower_group_query_attention import CausalMask, find_causal_mask

TOLERANCE = 5e-6
"""Only the order of sums differs: some 50 roundings of 2^-24 on values around 1."""


@pytest.fixture
def raw() -> ir.Model:
    return raw_graph()


@pytest.fixture
def canonical() -> ir.Model:
    return canonical_graph()


def decoder() -> Decoder:
    made, weights = Decoder(CONFIG, SLOTS, all_logits=True).eval(), random_weights(CONFIG)
    for name, parameter in made.named_parameters():
        parameter.data = weights[name].tensor
    made.rotary_cos, made.rotary_sin = rotary_tables(CONFIG, SLOTS)
    return made


@pytest.mark.parametrize(
    ("batch", "tokens", "start"),
    [(1, 1, 0), (1, 7, 0), (1, 8, 0), (1, 9, 0), (1, 32, 0), (1, 5, 20), (3, 11, 0), (3, 1, 7), (3, 1, 31)],
    ids=["first", "below", "full", "beyond", "all", "chunk", "prompts", "step to full", "last slot"],
)
@pytest.mark.parametrize("target", [None, "cpu", "onnx"], ids=["canonical", "cpu", "onnx"])
def test_it_computes_what_the_decoder_computes(
    canonical: ir.Model, target: str | None, batch: int, tokens: int, start: int
) -> None:
    feeds = decoder_feeds(canonical, batch=batch, tokens=tokens, start=start)
    caches = [torch.from_numpy(feeds[str(value.name)].copy()) for value in canonical.graph.inputs[2:]]
    with torch.no_grad():
        logits, presents = decoder()(
            torch.from_numpy(feeds["input_ids"]), torch.from_numpy(feeds["position_ids"]), caches
        )
    if target is not None:
        schedule.lower(canonical, target, torch.float32, torch.float32)

    results = list(run(canonical, feeds).values())

    np.testing.assert_allclose(results[0], logits, rtol=0, atol=TOLERANCE * float(logits.abs().max()))
    stop = start + tokens
    for result, present in zip(results[1:], presents, strict=True):
        # Slots past the valid ones may hold anything: no token sees them before they are written.
        np.testing.assert_allclose(result[:, :, :stop], present[:, :, :stop], rtol=0, atol=TOLERANCE)


def test_each_kind_of_layer_has_one_mask(canonical: ir.Model) -> None:
    attentions = of_type(canonical, "Attention")
    masks = [node.inputs[3] for node in attentions]
    assert masks[0] is masks[3]
    assert masks[1] is masks[2]
    assert len(of_type(canonical, "Where")) == 2
    assert [find_causal_mask(mask) for mask in masks] == [
        CausalMask(WINDOW),
        CausalMask(None),
        CausalMask(None),
        CausalMask(WINDOW),
    ]


def test_every_part_is_there_as_often_as_it_must(raw: ir.Model) -> None:
    report = schedule.canonicalize(raw)
    assert (report["fold_norm_gain"], report["fuse_rms_norm"]) == (4 * 4 + 1, 4 * 4 + 1)
    counts = Counter(node.op_type for node in raw.graph)
    assert (counts["RMSNormalization"], counts["Attention"], counts["Tanh"]) == (17, 4, 1)
    for node in of_type(raw, "Attention"):
        assert node.attributes["softcap"].as_float() == 5.0
        assert node.attributes["scale"].as_float() == pytest.approx(12**-0.5)


def test_onnxruntime_s_attention_has_window_and_cap(canonical: ir.Model) -> None:
    schedule.lower(canonical, "cpu", torch.float32, torch.float32)
    attentions = of_type(canonical, "GroupQueryAttention")
    windows = [node.attributes.get_int("local_window_size", -1) for node in attentions]
    assert windows == [WINDOW, -1, -1, WINDOW]
    assert all(node.attributes["softcap"].as_float() == 5.0 for node in attentions)
    assert not of_type(canonical, "Where")


def test_residuals_have_their_names_behind_a_norm(canonical: ir.Model) -> None:
    names = {str(node.outputs[0].name) for node in of_type(canonical, "Add")}
    for i in range(4):
        assert {f"layers.{i}.attention_residual", f"layers.{i}.mlp_residual"} <= names


def test_a_soft_cap_on_logits_is_computed_in_fp32(canonical: ir.Model) -> None:
    half_precision(canonical, torch.float16)
    (tanh,) = of_type(canonical, "Tanh")
    quotient, cap = tanh.inputs[0], tanh.outputs[0].uses()[0].node
    assert quotient is not None
    assert {quotient.dtype, tanh.outputs[0].dtype, cap.outputs[0].dtype} == {ir.DataType.FLOAT}


def test_channels_are_scaled_in_the_norms_before_and_not_in_those_behind(canonical: ir.Model) -> None:
    feeds = decoder_feeds(canonical, batch=1, tokens=12, start=0)
    before = run(canonical, feeds)
    generator = torch.Generator().manual_seed(0)

    def vector(channels: int) -> torch.Tensor:
        return torch.rand(channels, generator=generator) * 4 + 0.25

    widths = {"input_layernorm": 24, "pre_feedforward_layernorm": 24, "mlp.up_proj": 40}
    smoothing = {f"layers.{i}.{name}": vector(width) for i in range(4) for name, width in widths.items()}
    assert fold_channel_scales(canonical, smoothing) == 12
    for output, values in run(canonical, feeds).items():
        np.testing.assert_allclose(values, before[output], rtol=0, atol=4 * TOLERANCE, err_msg=output)
    with pytest.raises(GraphError, match="post_attention_layernorm cannot be scaled"):
        fold_channel_scales(canonical, {"layers.0.post_attention_layernorm": vector(24)})


# What must not be taken for a window, or for a cap


def constant(value: ir.Value | None, number: float) -> None:
    """Changes a constant that a graph holds."""
    assert value is not None
    assert value.dtype is not None
    value.const_value = ir.tensor(np.asarray(number, value.dtype.numpy()), name=value.name)


def slots_of_its_own(model: ir.Model) -> None:
    greater = of_type(model, "Greater")[0]
    other = ir.Value(name="other", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([1, 1, 1, SLOTS]))
    other.const_value = ir.tensor(np.zeros((1, 1, 1, SLOTS), np.int64), name="other")
    model.graph.register_initializer(other)
    greater.replace_input_with(0, other)


def either_of_both(model: ir.Model) -> None:
    of_type(model, "And")[0].op_type = "Or"


def the_slot_at_the_window_s_edge(model: ir.Model) -> None:
    of_type(model, "Greater")[0].op_type = "GreaterOrEqual"


def a_window_ahead(model: ir.Model) -> None:
    next(node for node in of_type(model, "Sub") if node.outputs[0].dtype == ir.DataType.INT64).op_type = "Add"


@pytest.mark.parametrize(
    "spoil",
    [slots_of_its_own, either_of_both, the_slot_at_the_window_s_edge, a_window_ahead],
    ids=lambda spoil: spoil.__name__,
)
def test_another_mask_is_not_counted_as_a_window(
    spoil: Callable[[ir.Model], None], canonical: ir.Model
) -> None:
    spoil(canonical)
    assert find_causal_mask(of_type(canonical, "Attention")[0].inputs[3]) is None
    assert find_causal_mask(of_type(canonical, "Attention")[1].inputs[3]) == CausalMask(None)
    with pytest.raises(GraphError, match="lower_group_query_attention fired 2 times on 4 layers"):
        schedule.lower(canonical, "cpu", torch.float32, torch.float32)


def a_cap_below_zero(raw: ir.Model) -> None:
    tanh = of_type(raw, "Tanh")[0]
    quotient = tanh.inputs[0]
    assert quotient is not None
    producer = quotient.producer()
    assert producer is not None
    constant(producer.inputs[1], -5.0)


def another_cap_behind_than_before(raw: ir.Model) -> None:
    multiply = of_type(raw, "Tanh")[0].outputs[0].uses()[0].node
    other = ir.Value(name="other", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([]))
    other.const_value = ir.tensor(np.float32(4.0), name="other")
    raw.graph.register_initializer(other)
    multiply.replace_input_with(1, other)


@pytest.mark.parametrize(
    ("spoil", "fired"),
    # The layers share the constant of their cap.
    [(a_cap_below_zero, 0), (another_cap_behind_than_before, 3)],
    ids=["below zero", "two caps"],
)
def test_what_is_no_soft_cap_is_not_fused(
    spoil: Callable[[ir.Model], None], fired: int, raw: ir.Model
) -> None:
    spoil(raw)
    with pytest.raises(GraphError, match=f"fuse_attention fired {fired} times on 4 layers instead of 4"):
        schedule.canonicalize(raw)


def test_a_norm_that_is_not_fused_stops_the_build(raw: ir.Model) -> None:
    for node in of_type(raw, "Pow")[:1]:
        other = ir.Value(name="three", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([]))
        other.const_value = ir.tensor(np.float32(3.0), name="three")
        raw.graph.register_initializer(other)
        node.replace_input_with(1, other)
    with pytest.raises(GraphError, match="fuse_rms_norm fired 16 times on 4 layers instead of 17"):
        schedule.canonicalize(raw)
