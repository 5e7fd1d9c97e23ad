"""The lowering for onnxruntime's CUDA provider, and the twin that shows on a CPU what it says."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from support.graphs import MakeGraph, decoder_feeds, run

from gemma_export.errors import GraphError
from gemma_export.graphs import schedule, spec_cuda
from gemma_export.graphs.formats import WeightFormat
from gemma_export.graphs.passes.emulate_half import emulate_half
from gemma_export.graphs.passes.fix_total_length import fix_total_length
from gemma_export.graphs.passes.unfuse import unfuse
from gemma_export.graphs.quantization import LinearQuantization, Quantization
from gemma_export.graphs.spec import MICROSOFT
from gemma_export.graphs.storage import write_model

LAYERS, SLOTS = 2, 16
HALVES = {torch.float16: ir.DataType.FLOAT16, torch.bfloat16: ir.DataType.BFLOAT16}


def lowered(
    make: MakeGraph, dtype: torch.dtype = torch.float16, quantization: Quantization | None = None
) -> ir.Model:
    model = make()
    schedule.canonicalize(model)
    schedule.lower(model, "cuda", dtype, dtype, (), quantization)
    return model


def codes(form: str, bits: int, *, block: int = 16) -> Quantization:
    """Every layer in a form, and the table in 8 bits; no channel is scaled."""
    linear = LinearQuantization(form, WeightFormat(bits, block, True))  # type: ignore[arg-type]
    names = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
    linears = {f"layers.{i}.{name}": linear for i in range(LAYERS) for name in names}
    return Quantization(
        {}, linears | {"embed_tokens": LinearQuantization("w8", WeightFormat(8, block, True))}
    )


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_every_product_and_cache_is_in_16_bits(raw_graph: MakeGraph, dtype: torch.dtype) -> None:
    model = lowered(raw_graph, dtype)
    half = HALVES[dtype]
    wide = {"RMSNormalization": 2 * LAYERS + 1, "Gelu": LAYERS, "Add": 2 * LAYERS}
    for node in model.graph:
        if node.op_type in ("FusedMatMul", "GroupQueryAttention", "Split"):
            assert node.outputs[0].dtype == half, node.name
        if node.op_type in wide:
            assert node.outputs[0].dtype == ir.DataType.FLOAT, node.name
            wide[node.op_type] -= 1
    assert set(wide.values()) == {0}
    assert {value.dtype for value in (*model.graph.inputs[2:], *model.graph.outputs[1:])} == {half}


@pytest.mark.parametrize(("form", "bits"), [("w8", 8), ("w4", 4)])
def test_products_of_codes_take_their_operand_as_it_is(raw_graph: MakeGraph, form: str, bits: int) -> None:
    model = lowered(raw_graph, quantization=codes(form, bits))
    products = [node for node in model.graph if node.op_type == "MatMulNBits"]
    assert len(products) == 4 * LAYERS + 1
    for node in products:
        assert node.attributes["accuracy_level"].as_int() == 0
        assert [value.dtype for value in node.inputs if value is not None] == [
            ir.DataType.FLOAT16,
            ir.DataType.UINT8,
            ir.DataType.FLOAT16,
        ]
    assert [node.attributes["bits"].as_int() for node in products] == [*[bits] * (4 * LAYERS), 8]


def test_a_step_needs_no_number_from_the_device(raw_graph: MakeGraph) -> None:
    model = lowered(raw_graph)
    nodes = [node for node in model.graph if node.op_type == "GroupQueryAttention"]
    assert len(nodes) == LAYERS
    for node in nodes:
        total = node.inputs[6]
        assert total is not None
        assert total.is_initializer()
        assert total.const_value is not None
        assert int(total.const_value.numpy()) == SLOTS


@pytest.mark.parametrize(("tokens", "start"), [(5, 0), (4, 7), (1, 3), (16, 0), (1, 15)])
def test_the_longest_row_changes_no_number(raw_graph: MakeGraph, tokens: int, start: int) -> None:
    model = raw_graph()
    schedule.canonicalize(model)
    schedule.run(model, schedule.ONNXRUNTIME)
    feeds = decoder_feeds(model, batch=1, tokens=tokens, start=start)
    before = run(model, feeds)
    assert fix_total_length(model) == LAYERS
    after = run(model, feeds)
    for name, values in before.items():
        valid = np.s_[:] if name == "logits" else np.s_[:, :, : start + tokens]
        # Sums over other lengths have another order: a few roundings of 2^-24 on values around 1.
        np.testing.assert_allclose(after[name][valid], values[valid], rtol=0, atol=5e-6, err_msg=name)


@pytest.mark.parametrize(
    ("op_type", "dtype"),
    [("GroupQueryAttention", ir.DataType.FLOAT), ("FusedMatMul", ir.DataType.DOUBLE)],
    ids=["attention in fp32", "a product in fp64"],
)
def test_a_format_without_a_kernel_is_refused(raw_graph: MakeGraph, op_type: str, dtype: ir.DataType) -> None:
    model = lowered(raw_graph)
    next(node for node in model.graph if node.op_type == op_type).outputs[0].dtype = dtype
    with pytest.raises(GraphError, match=f"there is none for {op_type}"):
        spec_cuda.CUDA.check(model)


def test_an_operator_without_a_kernel_is_refused_unless_it_is_constant(raw_graph: MakeGraph) -> None:
    model = lowered(raw_graph)
    unknown = ir.node("Erf", [model.graph.initializers["rotary_cos"]])
    unknown.outputs[0].dtype = ir.DataType.FLOAT16
    model.graph.insert_before(model.graph[0], unknown)
    assert spec_cuda.every_operator_has_a_cuda_kernel(model) is None
    unknown.replace_input_with(0, model.graph.inputs[2])
    problem = spec_cuda.every_operator_has_a_cuda_kernel(model)
    assert problem is not None
    assert "Erf" in problem


def test_attention_that_leaves_fp16_is_refused_with_the_way_out(raw_graph: MakeGraph) -> None:
    model = raw_graph()
    schedule.canonicalize(model)
    kept = {"layers.1.self_attn.attention"}
    with pytest.raises(GraphError, match=r"layers\.1\.self_attn\.attention") as refused:
        schedule.lower(model, "cuda", torch.float16, torch.float16, kept)
    assert "--precision bf16" in refused.value.hint


def twin(folder: Path, most: int = 1 << 26) -> ir.Model:
    """A lowered graph that was written, as the gate runs it."""
    model = ir.load(folder / "model.onnx")
    unfuse(model, most)
    emulate_half(model)
    own = {node.op_type for node in model.graph if node.domain == MICROSOFT}
    assert own == {"GroupQueryAttention"}
    assert {value.dtype for value in model.graph.inputs[2:]} == {ir.DataType.FLOAT}
    return model


# The largest error of a logit over the largest logit: 11 and 8 significant bits through two layers; codes of
# 8 bits in blocks of 16 add about as much as bfloat16, those of 4 bits sixteen times that.
ERRORS = [
    (torch.float16, None, (1e-5, 5e-3)),
    (torch.bfloat16, None, (5e-4, 4e-2)),
    (torch.float16, ("w8", 8), (5e-4, 4e-2)),
    (torch.float16, ("w4", 4), (1e-2, 0.6)),
]


@pytest.mark.parametrize(("dtype", "how", "bounds"), ERRORS, ids=["fp16", "bf16", "int8", "int4"])
@pytest.mark.parametrize(("tokens", "start"), [(5, 0), (3, 7)], ids=["prompt", "chunk"])
def test_the_twin_is_near_fp32_and_rounds(
    raw_graph: MakeGraph,
    tmp_path: Path,
    dtype: torch.dtype,
    how: tuple[str, int] | None,
    bounds: tuple[float, float],
    tokens: int,
    start: int,
) -> None:
    reference = raw_graph()
    schedule.canonicalize(reference)
    feeds = decoder_feeds(reference, batch=1, tokens=tokens, start=start)
    expected = run(reference, feeds)["logits"]
    write_model(lowered(raw_graph, dtype, None if how is None else codes(*how)), tmp_path)
    found = run(twin(tmp_path), feeds, tmp_path)
    error = float(np.abs(found["logits"] - expected).max() / np.abs(expected).max())
    assert bounds[0] < error < bounds[1]
    # What the cache keeps has been rounded, as a device keeps it.
    keys = found["present.0.key"][:, :, start : start + tokens]
    np.testing.assert_array_equal(keys, torch.from_numpy(keys).to(dtype).float().numpy())


@pytest.mark.parametrize(("form", "bits"), [("w8", 8), ("w4", 4)])
def test_a_large_product_in_pieces_is_the_product(
    raw_graph: MakeGraph, tmp_path: Path, form: str, bits: int
) -> None:
    write_model(lowered(raw_graph, quantization=codes(form, bits)), tmp_path)
    whole, pieces = twin(tmp_path), twin(tmp_path, most=32 * 20)
    feeds = decoder_feeds(whole, batch=1, tokens=3, start=2)
    wanted = run(whole, feeds, tmp_path)
    assert sum(node.op_type == "Concat" for node in pieces.graph) == 4 * LAYERS + 1
    for name, values in run(pieces, feeds, tmp_path).items():
        valid = np.s_[:] if name == "logits" else np.s_[:, :, :5]
        # A row's sum may be taken in another order, and then be rounded to 16 bits the other way.
        np.testing.assert_allclose(values[valid], wanted[name][valid], rtol=0, atol=5e-3, err_msg=name)


def test_codes_with_zero_points_are_not_measured_as_if_they_had_none(
    raw_graph: MakeGraph, tmp_path: Path
) -> None:
    write_model(lowered(raw_graph, quantization=codes("w8", 8)), tmp_path)
    model = ir.load(tmp_path / "model.onnx")
    product = next(node for node in model.graph if node.op_type == "MatMulNBits")
    product.resize_inputs(4)
    product.replace_input_with(3, product.inputs[1])
    with pytest.raises(GraphError, match="have zero points"):
        unfuse(model)
