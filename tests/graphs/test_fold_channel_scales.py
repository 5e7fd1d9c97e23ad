"""Channels scaled in one place and scaled back in the next: the model says the same."""

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest
import torch
from support.graphs import MakeGraph, run
from support.quantized_tiny import relative_error, tiny_canonical, tiny_feeds, tiny_source
from torch import Tensor

from gemma_export.errors import GraphError
from gemma_export.graphs import schedule, spec
from gemma_export.graphs.passes.fold_channel_scales import fold_channel_scales
from gemma_export.graphs.passes.store_half import store_half
from gemma_export.graphs.tensors import InMemory, StreamedTensor, streamed

pytestmark = pytest.mark.usefixtures("one_thread")

WIDTH, HIDDEN = 48, 32
"""Of the small graph's MLP and residual stream."""


def vectors(layers: int, hidden: int, width: int) -> dict[str, Tensor]:
    """A vector for everything that can be scaled: between 0.1 and 10, as many below 1 as above."""
    generator = torch.Generator().manual_seed(0)
    sizes = {"input_layernorm": hidden, "post_attention_layernorm": hidden, "mlp.up_proj": width}
    return {
        f"layers.{i}.{name}": 10 ** (2 * torch.rand(size, generator=generator) - 1)
        for i in range(layers)
        for name, size in sizes.items()
    }


def small_canonical(raw_graph: MakeGraph) -> ir.Model:
    model = raw_graph()
    schedule.canonicalize(model)
    return model


def values_of(model: ir.Model, name: str) -> Tensor:
    tensor = streamed(model.graph.initializers[name])
    assert tensor is not None
    return tensor.source.read(0, tensor.source.shape[0])


def test_the_model_that_ships_says_the_same() -> None:
    config = tiny_source().config
    before, after = tiny_canonical(), tiny_canonical()
    smoothing = vectors(config.num_layers, config.hidden_size, config.intermediate_size)
    assert fold_channel_scales(after, smoothing) == 3 * config.num_layers
    spec.CANONICAL.check(after)
    feeds = tiny_feeds()
    expected, found = run(before, feeds), run(after, feeds)
    # fp32 in another order: some hundred roundings of 2^-24 each way; measured 4e-7.
    assert relative_error(found["logits"], expected["logits"]) < 1e-5
    for part in ("key", "value"):
        name = f"present.0.{part}"
        np.testing.assert_allclose(
            found[name], expected[name], rtol=0, atol=1e-6 * float(np.abs(expected[name]).max())
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_scaled_weights_can_be_stored_in_16_bits(raw_graph: MakeGraph, dtype: torch.dtype) -> None:
    model, plain = small_canonical(raw_graph), small_canonical(raw_graph)
    name = "layers.0.mlp.down_proj.weight"
    scales = vectors(2, HIDDEN, WIDTH)
    fold_channel_scales(model, scales)
    store_half(model, dtype)
    expected = (values_of(plain, name) * scales["layers.0.mlp.up_proj"]).to(dtype)
    assert torch.equal(values_of(model, name), expected)


def test_each_vector_goes_where_it_belongs(raw_graph: MakeGraph) -> None:
    plain = small_canonical(raw_graph)
    scales = vectors(1, HIDDEN, WIDTH)
    touched = {
        "layers.0.input_layernorm": {"layers.0.input_layernorm.gain", "layers.0.self_attn.qkv_proj.weight"},
        "layers.0.post_attention_layernorm": {
            "layers.0.post_attention_layernorm.gain",
            "layers.0.mlp.gate_up_proj.weight",
        },
        "layers.0.mlp.up_proj": {"layers.0.mlp.gate_up_proj.weight", "layers.0.mlp.down_proj.weight"},
    }
    weights = [name for name, value in plain.graph.initializers.items() if streamed(value) is not None]
    for name, vector in scales.items():
        model = small_canonical(raw_graph)
        assert fold_channel_scales(model, {name: vector}) == 1
        changed = {
            weight
            for weight in weights
            if not torch.equal(values_of(model, weight), values_of(plain, weight))
        }
        assert changed == touched[name]


def test_the_gate_is_not_scaled_with_the_up_half(raw_graph: MakeGraph) -> None:
    model, plain = small_canonical(raw_graph), small_canonical(raw_graph)
    vector = vectors(1, HIDDEN, WIDTH)["layers.0.mlp.up_proj"]
    fold_channel_scales(model, {"layers.0.mlp.up_proj": vector})
    name = "layers.0.mlp.gate_up_proj.weight"
    assert torch.equal(values_of(model, name)[:WIDTH], values_of(plain, name)[:WIDTH])
    torch.testing.assert_close(
        values_of(model, name)[WIDTH:] * vector[:, None], values_of(plain, name)[WIDTH:], rtol=1e-6, atol=0
    )


def test_blocks_of_scaled_rows_are_the_scaled_blocks(raw_graph: MakeGraph) -> None:
    model = small_canonical(raw_graph)
    fold_channel_scales(model, vectors(2, HIDDEN, WIDTH))
    tensor = streamed(model.graph.initializers["layers.1.mlp.gate_up_proj.weight"])
    assert tensor is not None
    assert torch.equal(torch.cat(list(tensor.blocks(500))), tensor.source.read(0, 2 * WIDTH))


def test_no_vectors_change_nothing(raw_graph: MakeGraph) -> None:
    assert fold_channel_scales(small_canonical(raw_graph), {}) == 0


@pytest.mark.parametrize(
    "name",
    ["layers.2.input_layernorm", "layers.0.mlp.gate_proj", "layers.0.self_attn.o_proj", "embed_tokens", ""],
)
def test_a_name_that_the_graph_does_not_have(raw_graph: MakeGraph, name: str) -> None:
    with pytest.raises(GraphError, match=f"There is no {name} whose channels could be scaled"):
        fold_channel_scales(small_canonical(raw_graph), {name: torch.ones(HIDDEN)})


@pytest.mark.parametrize(
    ("name", "channels"),
    [("layers.0.input_layernorm", HIDDEN), ("layers.1.mlp.up_proj", WIDTH)],
    ids=["norm", "up"],
)
def test_a_vector_of_another_length(raw_graph: MakeGraph, name: str, channels: int) -> None:
    for wrong in (torch.ones(channels + 1), torch.ones(channels, 1), torch.ones(2 * channels)):
        with pytest.raises(GraphError, match=f"{name} has {channels} channels"):
            fold_channel_scales(small_canonical(raw_graph), {name: wrong})


@pytest.mark.parametrize("bad", [0.0, -1.0, torch.nan, torch.inf], ids=str)
def test_a_scale_that_is_not_positive(raw_graph: MakeGraph, bad: float) -> None:
    vector = torch.ones(HIDDEN)
    vector[7] = bad
    with pytest.raises(GraphError, match=r"layers.0.input_layernorm are not all positive"):
        fold_channel_scales(small_canonical(raw_graph), {"layers.0.input_layernorm": vector})


def first(graph: ir.Graph, op_type: str) -> ir.Node:
    return next(node for node in graph if node.op_type == op_type)


def observe_the_norm(graph: ir.Graph) -> None:
    norm = first(graph, "RMSNormalization")
    graph.append(ir.node("Gelu", [norm.outputs[0]]))


def share_a_weight(graph: ir.Graph) -> None:
    weight = graph.initializers["layers.0.self_attn.qkv_proj.weight"]
    graph.append(ir.node("Transpose", [weight]))


def share_a_gain(graph: ir.Graph) -> None:
    graph.append(
        ir.node("RMSNormalization", [graph.inputs[0], graph.initializers["layers.0.input_layernorm.gain"]])
    )


def observe_the_up_half(graph: ir.Graph) -> None:
    split = next(node for node in graph if node.op_type == "Split" and len(node.outputs) == 2)
    graph.append(ir.node("Gelu", [split.outputs[1]]))


def read_the_product_twice(graph: ir.Graph) -> None:
    gated = next(value for node in graph for value in node.outputs if value.name == "layers.0.mlp.gated")
    other = InMemory("other", torch.ones(HIDDEN, WIDTH))
    weight = ir.Value(name="other", const_value=StreamedTensor(other), shape=ir.Shape(other.shape))
    graph.register_initializer(weight)
    transpose = ir.node("Transpose", [weight], attributes={"perm": [1, 0]})
    graph.append(transpose)
    graph.append(ir.node("MatMul", [gated, transpose.outputs[0]]))


@pytest.mark.parametrize(
    ("spoil", "name", "reason"),
    [
        (observe_the_norm, "layers.0.input_layernorm", "a Gelu reads it"),
        (share_a_weight, "layers.0.input_layernorm", "qkv_proj.weight is read elsewhere too"),
        (share_a_gain, "layers.0.input_layernorm", "RMSNormalization, RMSNormalization read"),
        (observe_the_up_half, "layers.0.mlp.up_proj", "Mul, Gelu read"),
        (read_the_product_twice, "layers.0.mlp.up_proj", "2 weights read it"),
        (lambda graph: None, "norm", "embed_tokens.weight is read elsewhere too"),
    ],
    ids=["another reader", "shared weight", "shared gain", "up half", "two weights", "the table"],
)
def test_channels_that_others_read_are_left_alone(
    raw_graph: MakeGraph, spoil: Callable[[ir.Graph], None], name: str, reason: str
) -> None:
    model = small_canonical(raw_graph)
    spoil(model.graph)
    with pytest.raises(GraphError, match=f"The channels of {name} cannot be scaled: .*{reason}"):
        fold_channel_scales(model, {name: torch.ones(WIDTH if "up" in name else HIDDEN)})
