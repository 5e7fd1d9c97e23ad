"""Every pass of every schedule: how often it fires, and that it changes no number."""

import numpy as np
import onnx_ir as ir
import pytest
import torch
from support.graphs import MakeGraph, decoder_feeds, from_text, run, small_config

from gemma_export.errors import GraphError
from gemma_export.exporter.decoder import Decoder, rotary_tables
from gemma_export.graphs import schedule, spec
from gemma_export.graphs.tensors import streamed

LAYERS = 2
FP32 = schedule.Formats(torch.float32, torch.float32)
STEPS = {
    "canonical": schedule.CANONICAL,
    "cpu": schedule.cpu(FP32).steps,
    "tensorrt": schedule.tensorrt(FP32).steps,
}
"""The steps of each schedule; every lowering begins after those of the canonical graph."""
OF_SOFT_CAPS = "decompose_attention"
"""The pass that these graphs have nothing for (`test_decompose_attention.py`)."""
EACH_STEP = [
    (name, index)
    for name, steps in STEPS.items()
    for index in range(len(steps))
    if steps[index].name != OF_SOFT_CAPS
]

# A pass may change the order of sums and nothing else: some 50 roundings of 2^-24 on values around 1.
TOLERANCE = 5e-6


@pytest.mark.parametrize(
    ("name", "index"), EACH_STEP, ids=[f"{name}-{STEPS[name][index].name}" for name, index in EACH_STEP]
)
@pytest.mark.parametrize("num_kv_heads", [1, 4], ids=["mqa", "mha"])
def test_a_pass_fires_as_often_as_it_must_and_changes_no_number(
    raw_graph: MakeGraph, name: str, index: int, num_kv_heads: int
) -> None:
    model = raw_graph(num_kv_heads)
    step = STEPS[name][index]
    if name != "canonical":
        schedule.run(model, STEPS["canonical"])
    schedule.run(model, STEPS[name][:index])
    start, tokens = 2, 3
    feeds = decoder_feeds(model, batch=1, tokens=tokens, start=start)
    before = run(model, feeds)
    counted = step.count(model)

    count = step.run(model)

    assert count > 0
    if step.expected is not None:
        assert counted in (LAYERS, 2 * LAYERS + 1)  # layers, or their norms
        assert count == step.expected(counted)
    after = run(model, feeds)
    assert list(after) == list(before)
    for output, values in before.items():
        # Of a cache only the valid slots: what the others hold is never seen.
        valid = np.s_[:] if output == "logits" else np.s_[:, :, : start + tokens]
        np.testing.assert_allclose(
            after[output][valid], values[valid], rtol=0, atol=TOLERANCE, err_msg=output
        )


@pytest.mark.parametrize("num_kv_heads", [1, 2, 4], ids=["mqa", "gqa", "mha"])
@pytest.mark.parametrize(
    ("batch", "tokens", "start"),
    [(1, 1, 0), (1, 5, 0), (1, 4, 7), (1, 16, 0), (1, 1, 15), (3, 5, 0), (3, 1, 9)],
    ids=["first", "prompt", "chunk", "full", "last slot", "batch of prompts", "batch of steps"],
)
@pytest.mark.parametrize("target", [None, "cpu", "onnx"], ids=["canonical", "cpu", "onnx"])
def test_lowered_graphs_compute_what_the_decoder_computes(
    raw_graph: MakeGraph, target: str | None, num_kv_heads: int, batch: int, tokens: int, start: int
) -> None:
    model = raw_graph(num_kv_heads)
    decoder = _decoder(model, num_kv_heads)
    feeds = decoder_feeds(model, batch=batch, tokens=tokens, start=start)
    caches = [torch.from_numpy(feeds[str(value.name)].copy()) for value in model.graph.inputs[2:]]
    with torch.no_grad():
        logits, presents = decoder(
            torch.from_numpy(feeds["input_ids"]), torch.from_numpy(feeds["position_ids"]), caches
        )
    schedule.canonicalize(model)
    if target is not None:
        schedule.lower(model, target, torch.float32, torch.float32)
    results = list(run(model, feeds).values())
    np.testing.assert_allclose(results[0], logits, rtol=0, atol=TOLERANCE * float(logits.abs().max()))
    stop = start + tokens
    for result, present in zip(results[1:], presents, strict=True):
        # Slots past the valid ones may hold anything: no token sees them before they are written.
        np.testing.assert_allclose(result[:, :, :stop], present[:, :, :stop], rtol=0, atol=TOLERANCE)


def _decoder(model: ir.Model, num_kv_heads: int) -> Decoder:
    """The eager decoder with the weights that are bound to a graph."""
    config = small_config(num_kv_heads=num_kv_heads)
    slots = int(model.graph.inputs[2].shape[2])
    decoder = Decoder(config, slots, all_logits=True).eval()
    for name, parameter in decoder.named_parameters():
        tensor = streamed(model.graph.initializers[name])
        assert tensor is not None
        parameter.data = tensor.source.read(0, tensor.source.shape[0])
    decoder.rotary_cos, decoder.rotary_sin = rotary_tables(config, slots)
    return decoder


def test_a_pass_that_fires_too_seldom_stops_the_build(raw_graph: MakeGraph) -> None:
    model = raw_graph()
    norm = next(node for node in model.graph if node.op_type == "ReduceMean")
    norm.attributes["keepdims"] = ir.AttrInt64("keepdims", 0)
    pow_node = next(node for node in model.graph if node.op_type == "Pow")
    pow_node.replace_input_with(1, ir.val("three", const_value=ir.tensor(3.0)))
    with pytest.raises(GraphError, match="fuse_rms_norm fired 4 times on 2 layers instead of 5"):
        schedule.canonicalize(model)


def test_a_pass_names_the_passes_before_it() -> None:
    model = from_text("empty (float[1] x) => (float[1] y) { y = Identity(x) }")
    always_wrong = schedule.Step(lambda model: 3, lambda n: 4)
    always_wrong.run.__name__ = "never_right"
    with pytest.raises(GraphError, match=r"never_right fired 3 times .* \(after remove_dead_code\)"):
        schedule.run(model, (schedule.CANONICAL[-2], always_wrong))


def test_the_canonical_graph_holds_only_standard_operators(raw_graph: MakeGraph) -> None:
    model = raw_graph()
    schedule.canonicalize(model)
    assert {node.domain for node in model.graph} == {""}
    assert model.opset_imports == {"": 24}


def test_values_are_named_after_what_they_are(raw_graph: MakeGraph) -> None:
    model = raw_graph()
    schedule.canonicalize(model)
    names = {value.name for node in model.graph for value in node.outputs}
    for i in range(LAYERS):
        assert {
            f"layers.{i}.{part}"
            for part in (
                "input_layernorm",
                "self_attn.qkv_proj",
                "self_attn.attention",
                "self_attn.o_proj",
                "attention_residual",
                "post_attention_layernorm",
                "mlp.gate_up_proj",
                "mlp.activation",
                "mlp.gated",
                "mlp.down_proj",
                "mlp_residual",
            )
        } <= names
    assert {"embed_tokens", "norm"} <= names


@pytest.mark.parametrize("rule", [*spec.CANONICAL.rules, *spec.CPU.rules], ids=lambda rule: rule.__name__)
def test_a_finished_graph_keeps_every_rule(raw_graph: MakeGraph, rule: spec.Rule) -> None:
    model = raw_graph()
    schedule.canonicalize(model)
    if rule in spec.CPU.rules:
        schedule.lower(model, "cpu", torch.float32, torch.float32)
    assert rule(model) is None
