"""Attention with a soft-cap, taken apart for TensorRT: the same numbers, and in fp32 what must be."""

from collections import Counter
from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest
import torch
from support.graphs import decoder_feeds, run
from support.second_generation import CONFIG, SLOTS, WINDOW, canonical_graph, of_type

from gemma_export.calibration.range_audit import FP16_MAX
from gemma_export.errors import GraphError
from gemma_export.graphs import schedule, spec, spec_tensorrt
from gemma_export.graphs.passes.decompose_attention import decompose_attention
from gemma_export.graphs.passes.emulate_half import emulate_half
from gemma_export.graphs.passes.remove_dead_code import remove_dead_code

LAYERS = CONFIG.num_layers
GROUPS = CONFIG.num_query_heads // CONFIG.num_kv_heads
TOLERANCE = 5e-6
"""Only the order of sums differs: some 50 roundings of 2^-24 on values around 1."""
STEPS = pytest.mark.parametrize(
    ("batch", "tokens", "start"),
    [(1, 1, 0), (1, 2 * WINDOW, 0), (1, 3, WINDOW), (1, 1, 31), (3, 1, WINDOW - 1)],
    ids=["first", "prompt", "chunk", "last slot", "rows"],
)


def maker(value: ir.Value | None) -> ir.Node:
    assert value is not None
    node = value.producer()
    assert node is not None
    return node


@STEPS
def test_no_number_changes(batch: int, tokens: int, start: int) -> None:
    model = canonical_graph()
    feeds = decoder_feeds(model, batch=batch, tokens=tokens, start=start)
    before = run(model, feeds)
    assert decompose_attention(model) == LAYERS
    remove_dead_code(model)
    for output, values in run(model, feeds).items():
        valid = np.s_[:] if output == "logits" else np.s_[:, :, : start + tokens]
        np.testing.assert_allclose(values[valid], before[output][valid], rtol=0, atol=TOLERANCE)


def test_each_query_head_of_a_group_has_its_products() -> None:
    model = canonical_graph()
    schedule.lower(model, "onnx", torch.float32, torch.float32)
    counts = Counter(node.op_type for node in model.graph)
    assert (counts["Attention"], counts["Softmax"]) == (0, GROUPS * LAYERS)
    assert counts["Tanh"] == GROUPS * LAYERS + 1  # And that of the logits.
    products = [node for node in of_type(model, "MatMul") if spec.reads_cache(node)]
    assert len(products) == 2 * GROUPS * LAYERS
    # Of every S x S matrix, the last reader is in its own layer.
    order = {node: number for number, node in enumerate(model.graph)}
    for i, name in enumerate(f"layers.{i}.self_attn.attention" for i in range(LAYERS)):
        (merged,) = [node for node in model.graph if node.outputs[0].name == name]
        before = list(model.graph)[: order[merged]]
        own = [node for node in before if str(node.outputs[0].name).startswith(f"{name}.")]
        readers = [use.node for node in own for output in node.outputs for use in output.uses()]
        assert readers
        assert max(order[node] for node in readers) == order[merged], f"layer {i}"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_between_the_products_everything_is_fp32(dtype: torch.dtype) -> None:
    model = canonical_graph()
    schedule.lower(model, "onnx", dtype, dtype)
    half = ir.DataType.FLOAT16 if dtype == torch.float16 else ir.DataType.BFLOAT16
    for node in model.graph:
        if node.op_type in ("Softmax", "Tanh", "Div"):
            assert {value.dtype for value in (*node.inputs, *node.outputs) if value} == {ir.DataType.FLOAT}
        if node.op_type == "MatMul":
            assert {value.dtype for value in (*node.inputs, *node.outputs) if value} == {half}
    for mask in of_type(model, "Where"):
        minimum = mask.inputs[2]
        assert minimum is not None
        assert minimum.const_value is not None
        assert float(minimum.const_value.numpy()) == float(np.finfo(np.float32).min)
        assert not [use.node for use in mask.outputs[0].uses() if use.node.op_type == "Cast"]


def test_a_score_that_leaves_fp16_becomes_the_cap() -> None:
    """Of queries and keys of some hundreds, several products are beyond 65504; nothing after them is NaN."""
    model = canonical_graph(projections=2.0**8)
    schedule.lower(model, "onnx", torch.float16, torch.float16)
    emulate_half(model)
    feeds = decoder_feeds(model, batch=1, tokens=SLOTS, start=0)
    parts = ("scores.0", "capped.0")
    named = {str(value.name): value for node in model.graph for value in node.outputs}
    shown = [named[f"layers.0.self_attn.attention.{part}"] for part in parts]
    model.graph.outputs.extend(shown)
    found = run(model, feeds)
    scores, capped = (found[str(value.name)] for value in shown)
    beyond = np.abs(scores) > FP16_MAX
    assert 0 < beyond.sum() < beyond.size
    np.testing.assert_array_equal(capped[beyond], np.sign(scores[beyond]) * CONFIG.attention_softcap)
    assert np.isfinite(found["logits"]).all()


def test_attention_that_is_kept_in_fp32_is_left_as_it_is() -> None:
    model = canonical_graph()
    kept = "layers.2.self_attn.attention"
    schedule.lower(model, "onnx", torch.float16, torch.float16, {kept})
    (attention,) = of_type(model, "Attention")
    assert (attention.outputs[0].name, attention.outputs[0].dtype) == (kept, ir.DataType.FLOAT)
    assert len(of_type(model, "Softmax")) == GROUPS * (LAYERS - 1)
    with pytest.raises(GraphError, match="leaves the range of fp16"):
        schedule.lower(canonical_graph(), "rtx", torch.float16, torch.float16, {kept})


# Spellings that compute the same, and that TensorRT makes something else of


def values_as_they_lie(model: ir.Model) -> None:
    """weights · value, as attention is written everywhere."""
    product = next(node for node in of_type(model, "MatMul") if ".attended." in str(node.name))
    values, columns = (maker(value).inputs[0] for value in product.inputs)
    upright = maker(product.outputs[0].uses()[0].node.outputs[0])
    straight = ir.node("MatMul", [columns, values], name=product.name)
    straight.outputs[0].dtype, straight.outputs[0].name = product.outputs[0].dtype, "straight"
    model.graph.insert_before(product, straight)
    upright.outputs[0].replace_all_uses_with(straight.outputs[0])
    model.graph.remove([upright, product], safe=True)


def a_cache_behind_an_identity(model: ir.Model) -> None:
    keys = next(node for node in of_type(model, "Transpose") if str(node.name).endswith(".keys"))
    identity = ir.node("Identity", [keys.inputs[0]], name="identity")
    identity.outputs[0].name, identity.outputs[0].dtype = "identity", ir.DataType.FLOAT16
    model.graph.insert_before(keys, identity)
    keys.replace_input_with(0, identity.outputs[0])


def softmax_in_16_bits(model: ir.Model) -> None:
    of_type(model, "Softmax")[3].outputs[0].dtype = ir.DataType.FLOAT16


def a_soft_cap_of_the_operator(model: ir.Model) -> None:
    softmax = of_type(model, "Softmax")[0]
    attention = ir.node("Attention", softmax.inputs, {"softcap": 50.0}, name="attention")
    attention.outputs[0].name, attention.outputs[0].dtype = "attention", ir.DataType.FLOAT16
    model.graph.insert_before(softmax, attention)


@pytest.mark.parametrize(
    ("spoil", "rule"),
    [
        (values_as_they_lie, spec_tensorrt.products_read_caches_where_they_lie),
        (a_cache_behind_an_identity, spec_tensorrt.every_layer_has_its_attention),
        (softmax_in_16_bits, spec_tensorrt.scores_are_capped_in_fp32),
        (a_soft_cap_of_the_operator, spec_tensorrt.attention_has_no_soft_cap),
    ],
    ids=lambda value: value.__name__,
)
def test_a_broken_rule_is_seen(spoil: Callable[[ir.Model], None], rule: spec.Rule) -> None:
    model = canonical_graph()
    schedule.lower(model, "rtx", torch.float16, torch.float16)
    assert rule(model) is None
    spoil(model)
    assert rule(model) is not None
    assert rule in spec_tensorrt.TENSORRT.rules
    with pytest.raises(GraphError, match="TensorRT graph breaks the rule"):
        spec_tensorrt.TENSORRT.check(model)
