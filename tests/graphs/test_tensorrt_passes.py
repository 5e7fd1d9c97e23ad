"""The passes of TensorRT's schedule: what they make, that no number changes, and what they leave alone."""

import numpy as np
import onnx_ir as ir
import pytest
import torch
from support.graphs import MakeGraph, canonical, decoder_feeds, from_text, run

from gemma_export.errors import GraphError
from gemma_export.graphs import schedule
from gemma_export.graphs.formats import WeightFormat
from gemma_export.graphs.passes.emulate_half import emulate_half
from gemma_export.graphs.passes.flatten_tokens import flatten_tokens
from gemma_export.graphs.passes.keep_codes import keep_codes
from gemma_export.graphs.passes.patterns import ints
from gemma_export.graphs.passes.quantize_dequantize import quantize_dequantize
from gemma_export.graphs.passes.quantized_layers import add_constant
from gemma_export.graphs.passes.reshape_gate_up import reshape_gate_up
from gemma_export.graphs.passes.scale_products import scale_products
from gemma_export.graphs.passes.transpose_lookup import transpose_lookup
from gemma_export.graphs.quantization import LinearQuantization, Quantization
from gemma_export.graphs.tensors import InMemory, StreamedTensor, streamed

LAYERS = 2
ROWS = LinearQuantization("w8", WeightFormat(8))
LINEARS = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")

# As in test_schedule.py: a pass may change the order of sums and nothing else.
TOLERANCE = 5e-6


def nodes(model: ir.Model, op_type: str) -> list[ir.Node]:
    return [node for node in model.graph if node.op_type == op_type]


def assert_computes(model: ir.Model, reference: ir.Model, *, batch: int, tokens: int, start: int) -> None:
    """Asserts that two graphs give the same logits and the same valid slots."""
    feeds = decoder_feeds(reference, batch=batch, tokens=tokens, start=start)
    expected, found = run(reference, feeds), run(model, feeds)
    for name, values in expected.items():
        valid = np.s_[:] if name == "logits" else np.s_[:, :, : start + tokens]
        assert found[name].shape == values.shape
        np.testing.assert_allclose(found[name][valid], values[valid], rtol=0, atol=TOLERANCE, err_msg=name)


# flatten_tokens


def test_every_product_and_norm_reads_tokens_on_one_axis(raw_graph: MakeGraph) -> None:
    model = canonical(raw_graph)
    assert flatten_tokens(model) == 4 * LAYERS + 1
    for node in model.graph:
        if node.op_type in ("MatMul", "RMSNormalization", "Add", "Gelu"):
            value = node.inputs[0]
            assert value is not None
            assert value.shape is not None
            assert len(value.shape) == 3, node.name
            assert value.shape[0] == 1, node.name
    # The shape of the rows is asked for once, whatever the layers.
    assert len(nodes(model, "Shape")) == 1
    assert len(nodes(model, "Concat")) == 2  # to heads, and to the logits of all tokens
    assert model.graph.outputs[0].name == "logits"


@pytest.mark.parametrize(("batch", "tokens", "start"), [(1, 1, 5), (1, 6, 3), (3, 1, 9), (3, 4, 0)], ids=str)
@pytest.mark.parametrize("all_logits", [True, False], ids=["all logits", "last logits"])
def test_rows_of_a_batch_are_kept_apart(
    raw_graph: MakeGraph, all_logits: bool, batch: int, tokens: int, start: int
) -> None:
    model, reference = (last_logits(canonical(raw_graph), all_logits) for _ in range(2))
    flatten_tokens(model)
    assert_computes(model, reference, batch=batch, tokens=tokens, start=start)


def last_logits(model: ir.Model, all_logits: bool) -> ir.Model:
    """The canonical graph; where not all logits are wanted, the last token is cut out before the norm."""
    if all_logits:
        return model
    graph = model.graph
    norm = next(node for node in graph if node.name == "norm")
    hidden = norm.inputs[0]
    bounds = [add_constant(graph, f"bound_{value}", [value], ir.DataType.INT64) for value in (-1, 2**62, 1)]
    cut = ir.node("Slice", [hidden, *bounds])
    cut.outputs[0].name, cut.outputs[0].dtype = "last", ir.DataType.FLOAT
    for value in (cut.outputs[0], norm.outputs[0], graph.outputs[0]):
        width = graph.outputs[0].shape[-1] if value is graph.outputs[0] else 32
        value.shape = ir.Shape(["batch", 1, width])
    graph.insert_before(norm, cut)
    norm.replace_input_with(0, cut.outputs[0])
    return model


@pytest.mark.parametrize("op_type", ["Softmax", "Transpose", "Concat"])
def test_an_operator_that_could_mix_tokens_is_an_error(raw_graph: MakeGraph, op_type: str) -> None:
    model = canonical(raw_graph)
    norm = nodes(model, "RMSNormalization")[1]
    between = ir.node(op_type, [norm.inputs[0]])
    between.outputs[0].shape, between.outputs[0].dtype = norm.inputs[0].shape, ir.DataType.FLOAT
    model.graph.insert_before(norm, between)
    norm.replace_input_with(0, between.outputs[0])
    with pytest.raises(GraphError, match=f"a {op_type} reads layers.0.attention_residual"):
        flatten_tokens(model)


def test_a_number_for_each_token_is_an_error(raw_graph: MakeGraph) -> None:
    model = canonical(raw_graph)
    residual = next(node for node in model.graph if node.name == "layers.0.mlp_residual")
    residual.replace_input_with(0, ir.Value(name="other", shape=ir.Shape(["batch", "tokens", 1])))
    with pytest.raises(GraphError, match="a Add reads"):
        flatten_tokens(model)


# reshape_gate_up

PAIR = """
pair (float[4, 4] x, float[8, 4] w) => (float[N, M] gate, float[N, M] up)
<float[4, 8] both, float[4, 8] w_t, float[N, M] first, float[N, M] second>
{
    w_t = Transpose<perm = [1, 0]>(w)
    both = MatMul(x, w_t)
    first, second = Split<axis = AXIS, num_outputs = 2>(both)
    gate = Identity(first)
    up = Identity(second)
}"""


def pair(axis: str, rows: str, columns: str) -> ir.Model:
    """The product of gate and up, split along an axis into halves [rows, columns]."""
    text = PAIR.replace("AXIS", axis).replace("N, M", f"{rows}, {columns}")
    return from_text(text, w=np.arange(32, dtype=np.float32).reshape(8, 4))


def test_gate_and_up_keep_their_places() -> None:
    x = np.eye(4, dtype=np.float32)
    model = pair("-1", "4", "4")
    before = run(model, {"x": x})
    assert reshape_gate_up(model) == 1
    (split,) = nodes(model, "Split")
    assert split.attributes["axis"].as_int() == 1
    assert [ints(node.inputs[1]) for node in nodes(model, "Reshape")] == [[0, 2, 4], [0, 4], [0, 4]]
    after = run(model, {"x": x})
    for name in ("gate", "up"):
        np.testing.assert_array_equal(after[name], before[name])
    assert not np.array_equal(before["gate"], before["up"])


def test_a_split_of_tokens_or_of_no_product_is_left_alone(raw_graph: MakeGraph) -> None:
    model = pair("0", "2", "8")
    assert reshape_gate_up(model) == 0
    model = canonical(raw_graph)
    for node in nodes(model, "Split"):
        if node.attributes["axis"].as_int() == -1:
            gelu = ir.node("Gelu", [node.inputs[0]])
            gelu.outputs[0].shape = node.inputs[0].shape
            model.graph.insert_before(node, gelu)
            node.replace_input_with(0, gelu.outputs[0])
    assert reshape_gate_up(model) == 0


# transpose_lookup


def of_codes(raw_graph: MakeGraph, *, flat: bool = True, how: LinearQuantization = ROWS) -> ir.Model:
    model = canonical(raw_graph)
    if flat:
        flatten_tokens(model)
    names = [f"layers.{i}.{name}" for i in range(LAYERS) for name in LINEARS]
    quantize_dequantize(model, Quantization({}, {"embed_tokens": ROWS} | dict.fromkeys(names, how)))
    schedule.remove_dead_code(model)
    return model


@pytest.mark.parametrize("batch", [1, 3])
def test_looking_up_in_the_heads_view_changes_no_number(raw_graph: MakeGraph, batch: int) -> None:
    model, reference = of_codes(raw_graph), of_codes(raw_graph)
    assert transpose_lookup(model) == 1
    assert transpose_lookup(model) == 0
    head = next(node for node in nodes(model, "MatMul") if str(node.name).startswith("lm_head"))
    lookup = next(node for node in nodes(model, "Gather") if node.name == "embed_tokens.unscaled")
    assert lookup.inputs[0] is head.inputs[1]
    assert_computes(model, reference, batch=batch, tokens=4, start=2)


def test_numbers_are_looked_up_as_they_are_stored(raw_graph: MakeGraph) -> None:
    model = canonical(raw_graph)
    flatten_tokens(model)
    assert transpose_lookup(model) == 0


def test_ids_with_an_axis_for_the_batch_are_left_alone(raw_graph: MakeGraph) -> None:
    assert transpose_lookup(of_codes(raw_graph, flat=False)) == 0


def test_a_table_without_a_head_is_left_alone(raw_graph: MakeGraph) -> None:
    model = of_codes(raw_graph)
    head = next(node for node in nodes(model, "MatMul") if str(node.name).startswith("lm_head"))
    other = ir.Value(name="other", shape=head.inputs[1].shape, type=ir.TensorType(ir.DataType.FLOAT))
    head.replace_input_with(1, other)
    assert transpose_lookup(model) == 0


# keep_codes


@pytest.mark.parametrize("batch", [1, 3])
def test_arithmetic_before_a_product_of_codes_changes_no_number(raw_graph: MakeGraph, batch: int) -> None:
    model, reference = of_codes(raw_graph), of_codes(raw_graph)
    assert keep_codes(model) == LAYERS
    assert keep_codes(model) == 0
    assert [str(node.name).split(".")[3] for node in nodes(model, "Max")] == ["o_proj"] * LAYERS
    assert_computes(model, reference, batch=batch, tokens=4, start=2)


def test_products_of_numbers_and_of_rounded_operands_are_left_alone(raw_graph: MakeGraph) -> None:
    model = canonical(raw_graph)
    flatten_tokens(model)
    assert keep_codes(model) == 0
    assert (
        keep_codes(
            of_codes(raw_graph, how=LinearQuantization("w8a8-tensor", WeightFormat(8), activation_scale=0.5))
        )
        == 0
    )
    assert keep_codes(of_codes(raw_graph, how=LinearQuantization("w4", WeightFormat(4, 16)))) == 0


@pytest.mark.parametrize(("sms", "count"), [((), None), ((86, 89), None), ((75,), 2), ((75, 89), 2)], ids=str)
def test_only_a_graph_for_sm_75_has_it(raw_graph: MakeGraph, sms: tuple[int, ...], count: int | None) -> None:
    names = [f"layers.{i}.{name}" for i in range(LAYERS) for name in LINEARS]
    quantization = Quantization({}, dict.fromkeys(["embed_tokens", *names], ROWS))
    model = canonical(raw_graph)
    report = schedule.lower(model, "rtx", torch.float16, torch.float16, (), quantization, sms)
    assert report.get("keep_codes") == count
    assert len(nodes(model, "Max")) == (count or 0)


# scale_products


def test_a_product_that_leaves_fp16_is_scaled_by_a_power_of_two(raw_graph: MakeGraph) -> None:
    model, reference = canonical(raw_graph), canonical(raw_graph)
    flatten_tokens(model)
    # What a value is read through only moves it about; what is made of it is another value.
    keep = {"layers.0.mlp.gate_up_proj", "layers.0.mlp.gated", "layers.1.self_attn.attention"}
    assert scale_products(model, keep) == 3
    names = {
        str(node.name).removesuffix(".unscaled")
        for node in nodes(model, "MatMul")
        if ".unscaled" in node.name
    }
    assert names == {"layers.0.mlp.gate_up_proj", "layers.0.mlp.down_proj", "layers.1.self_attn.o_proj"}
    made = {value.name: value.producer().op_type for node in model.graph for value in node.outputs}  # type: ignore[union-attr]
    assert {made[name] for name in names} == {"Mul"}
    feeds = decoder_feeds(reference, batch=2, tokens=3, start=2)
    expected, found = run(reference, feeds), run(model, feeds)
    # Not a digit is lost: what differs is the order of sums, as of any product of other shapes.
    np.testing.assert_allclose(found["logits"], expected["logits"], rtol=0, atol=TOLERANCE)


def test_weights_in_fp32_and_codes_are_not_scaled(raw_graph: MakeGraph) -> None:
    keep = {"layers.0.mlp.down_proj", "layers.0.mlp.down_proj.weight"}
    assert scale_products(canonical(raw_graph), keep) == 0
    assert scale_products(canonical(raw_graph), {"layers.0.mlp.down_proj"}) == 1
    assert scale_products(of_codes(raw_graph), {"layers.0.mlp.down_proj"}) == 0
    assert scale_products(canonical(raw_graph), {"layers.0.mlp.activation"}) == 0
    assert scale_products(canonical(raw_graph), {"layers.0.self_attn.qkv_proj"}) == 0


def test_a_scaled_product_is_finite_in_fp16(raw_graph: MakeGraph) -> None:
    """A layer whose up is 2^15 times as large, and whose down as much smaller: in fp32 nothing changes."""
    name, found = "layers.0.mlp.gate_up_proj", {}
    for keep in ((), (name, "layers.0.mlp.gated")):
        model = canonical(raw_graph)
        up, down = (
            model.graph.initializers[f"layers.0.mlp.{part}.weight"] for part in ("gate_up_proj", "down_proj")
        )
        for value, factor in ((up, 2.0**15), (down, 2.0**-15)):
            tensor = streamed(value)
            assert tensor is not None
            rows = tensor.source.read(0, tensor.source.shape[0])
            half = len(rows) // 2 if value is up else 0
            rows[half:] *= factor
            value.const_value = StreamedTensor(InMemory(str(value.name), rows))
        schedule.lower(model, "onnx", torch.float16, torch.float16, keep)
        assert model.graph.initializers[f"{name}.weight"].dtype == ir.DataType.FLOAT16
        emulate_half(model)
        found[keep] = run(model, decoder_feeds(model, batch=1, tokens=4, start=0))["logits"]
    lost, kept = found.values()
    assert not np.isfinite(lost).all()
    reference = canonical(raw_graph)
    expected = run(reference, decoder_feeds(reference, batch=1, tokens=4, start=0))["logits"]
    # As in test_half.py: 2^-11 per rounding, some tens of them.
    assert np.abs(kept - expected).max() < 5e-3 * np.abs(expected).max()


@pytest.mark.parametrize("target", ["rtx", "tensorrt"])
def test_attention_in_fp32_is_refused_where_the_graph_is_compiled(raw_graph: MakeGraph, target: str) -> None:
    keep = {"layers.1.self_attn.attention", "layers.1.self_attn.qkv_proj"}
    schedule.lower(canonical(raw_graph), "onnx", torch.float16, torch.float16, keep)
    with pytest.raises(GraphError, match="attention leaves the range of fp16") as caught:
        schedule.lower(canonical(raw_graph), target, torch.float16, torch.float16, keep)
    assert "--precision bf16" in str(caught.value.hint)
    schedule.lower(canonical(raw_graph), target, torch.bfloat16, torch.bfloat16)
