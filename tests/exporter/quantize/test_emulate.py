"""Layers that compute as a device does: what is rounded, with which vectors, and that it can be undone."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from gemma_export.exporter.config import GemmaConfig
from gemma_export.exporter.decoder import DecoderLayer
from gemma_export.exporter.quantize.emulate import (
    DeviceTable,
    activation_rounding,
    computed_as,
    device_linears,
    merged_layers,
    merged_shapes,
    stored_bytes,
)
from gemma_export.graphs.formats import Form, WeightFormat
from gemma_export.graphs.quantization import (
    LinearQuantization,
    Quantization,
    decode,
    encode,
    nearest_scales,
    pack_nibbles,
    round_per_tensor,
    round_per_token,
    round_trip,
)
from gemma_export.graphs.tensors import InMemory

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = GemmaConfig(
    name="random",
    vocab_size=96,
    hidden_size=32,
    num_layers=2,
    num_query_heads=4,
    num_kv_heads=2,
    head_dim=16,
    intermediate_size=48,
    context_length=16,
)
BLOCKS, ROWS = WeightFormat(8, 16), WeightFormat(8)
NAMES = tuple(f"layers.0.{name}" for name in merged_layers(CONFIG))


@pytest.fixture
def layer() -> DecoderLayer:
    torch.manual_seed(0)
    made = DecoderLayer(CONFIG)
    for name, parameter in made.named_parameters():
        size = 0.1 if name.endswith("layernorm.weight") else parameter.shape[-1] ** -0.5
        torch.nn.init.normal_(parameter, std=size)
    return made.requires_grad_(False)


def smoothing() -> dict[str, torch.Tensor]:
    """Vectors far from one, so that a forgotten one is seen."""
    generator = torch.Generator().manual_seed(1)
    sizes = {"input_layernorm": 32, "post_attention_layernorm": 32, "mlp.up_proj": 48}
    return {
        f"layers.0.{name}": torch.exp(2 * torch.rand(size, generator=generator) - 1)
        for name, size in sizes.items()
    }


def quantization(form: Form = "w8", layout: WeightFormat | None = BLOCKS, **options: object) -> Quantization:
    linear = LinearQuantization(form, layout, **options)  # type: ignore[arg-type]
    return Quantization(smoothing(), dict.fromkeys((*NAMES, "embed_tokens"), linear))


def run(layer: DecoderLayer, x: torch.Tensor) -> torch.Tensor:
    length = x.shape[1]
    positions = torch.arange(length)[None]
    angles = torch.outer(torch.arange(length), torch.rand(8, generator=torch.Generator().manual_seed(2)))
    mask = torch.full((length, length), -1e9).triu(1)[None, None]
    cache = torch.zeros(1, CONFIG.num_kv_heads, length, CONFIG.head_dim)
    return layer(x, positions, angles.cos()[None, None], angles.sin()[None, None], mask, cache, cache)[0]


def hidden(tokens: int = 7, width: int = 32) -> torch.Tensor:
    return torch.randn(1, tokens, width, generator=torch.Generator().manual_seed(3))


def stored_merged(layer: DecoderLayer, name: str) -> torch.Tensor:
    """A merged weight as the graph stores it before it is rounded: smoothing folded into columns and rows."""
    vectors = smoothing()
    norm, other, up = (
        vectors[f"layers.0.{key}"] for key in ("input_layernorm", "post_attention_layernorm", "mlp.up_proj")
    )
    attention, mlp = layer.self_attn, layer.mlp
    match name.rpartition(".")[2]:
        case "qkv_proj":
            parts = [part.weight * norm for part in (attention.q_proj, attention.k_proj, attention.v_proj)]
        case "o_proj":
            parts = [attention.o_proj.weight]
        case "gate_up_proj":
            parts = [mlp.gate_proj.weight * other, mlp.up_proj.weight * other / up[:, None]]
        case _:
            parts = [mlp.down_proj.weight * up]
    return torch.cat(parts)


@pytest.mark.parametrize("name", NAMES)
def test_a_projection_is_its_rows_of_the_stored_weight_times_the_smoothed_input(layer, name):
    parts = device_linears(layer, "layers.0", quantization("w8a8-token", ROWS), "cpu")[name]
    stored = round_trip(stored_merged(layer, name), ROWS)
    x = hidden(width=stored.shape[1])
    key = {
        "qkv_proj": "input_layernorm",
        "gate_up_proj": "post_attention_layernorm",
        "down_proj": "mlp.up_proj",
    }
    vector = smoothing().get(f"layers.0.{key.get(name.rpartition('.')[2])}", torch.ones(stored.shape[1]))
    expected = round_per_token(x / vector) @ stored.T
    if name.endswith("gate_up_proj"):  # The up half's outputs are divided; alone, they are multiplied back.
        expected[..., 48:] *= smoothing()["layers.0.mlp.up_proj"]
    actual = torch.cat([part.forward(x) for part in parts], dim=-1)
    # The same products, summed up over other rows: 2^-24 times the square root of 48 terms.
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("names", [(name,) for name in NAMES] + [NAMES], ids=[*NAMES, "all"])
def test_eight_bits_with_smoothing_change_little(layer, names):
    linears = device_linears(layer, "layers.0", quantization(), "cpu")
    x = hidden()
    plain = run(layer, x)
    with computed_as(part for name in names for part in linears[name]):
        error = (run(layer, x) - plain).norm() / (plain - x).norm()
    # Weights and activations are each off by at most 1/254 of their block's largest, some 1 % together with
    # the smoothing's spread of e^2; a vector forgotten or applied twice is off by more than a half.
    assert 1e-4 < error < 0.03


def test_only_the_chosen_layer_is_rounded(layer):
    linears = device_linears(layer, "layers.0", quantization(), "cpu")
    x = hidden()
    before = [layer.self_attn.q_proj(x), layer.mlp.gate_proj(x)]
    with computed_as(linears["layers.0.self_attn.o_proj"]):
        for module, plain in zip((layer.self_attn.q_proj, layer.mlp.gate_proj), before, strict=True):
            torch.testing.assert_close(module(x), plain, rtol=0, atol=0)
        attended = hidden(width=64)
        assert not torch.equal(layer.self_attn.o_proj(attended), attended @ layer.self_attn.o_proj.weight.T)


def test_it_is_put_back_even_after_an_error(layer):
    linears = device_linears(layer, "layers.0", quantization(), "cpu")
    x, weight = hidden(), layer.mlp.up_proj.weight.clone()
    plain = run(layer, x)
    with pytest.raises(KeyboardInterrupt), computed_as(part for parts in linears.values() for part in parts):
        raise KeyboardInterrupt
    torch.testing.assert_close(run(layer, x), plain, rtol=0, atol=0)
    torch.testing.assert_close(layer.mlp.up_proj.weight, weight, rtol=0, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_stored_codes_are_taken_by_the_rows_of_the_merged_weight(layer, name):
    merged = stored_merged(layer, name)
    scales = nearest_scales(merged, BLOCKS) * 0.9  # Other scales than rounding would find.
    codes = encode(merged, scales, BLOCKS)
    linear = LinearQuantization("w8", BLOCKS, stored=(InMemory("codes", codes), InMemory("scales", scales)))
    whole = Quantization(smoothing(), {**quantization().linears, name: linear})
    parts = device_linears(layer, "layers.0", whole, "onnx")[name]
    expected = decode(codes, scales, BLOCKS)
    if name.endswith("gate_up_proj"):
        expected[48:] *= smoothing()["layers.0.mlp.up_proj"][:, None]
    torch.testing.assert_close(torch.cat([part.weight for part in parts]), expected, rtol=0, atol=0)


def test_weights_are_rounded_alike_whatever_the_blocks_they_are_read_in(layer, monkeypatch):
    whole = device_linears(layer, "layers.0", quantization(), "cpu")
    monkeypatch.setattr("gemma_export.exporter.quantize.emulate.BLOCK_BYTES", 3 * 4 * 32)
    for name, parts in device_linears(layer, "layers.0", quantization(), "cpu").items():
        for part, expected in zip(parts, whole[name], strict=True):
            torch.testing.assert_close(part.weight, expected.weight, rtol=0, atol=0)


def test_what_keeps_16_bits_is_left_alone(layer):
    kept = {**quantization().linears, NAMES[0]: LinearQuantization("float")}
    found = device_linears(layer, "layers.0", Quantization(smoothing(), kept), "cpu")
    assert tuple(found) == NAMES[1:]


@pytest.mark.parametrize(
    ("form", "target", "expected"),
    [
        ("float", "cpu", lambda x: x),
        ("w8a8-token", "cpu", round_per_token),
        ("w8a8-token", "onnx", round_per_token),
        ("w8a8-tensor", "onnx", lambda x: round_per_tensor(x, 0.02)),
        ("w8", "cpu", lambda x: round_per_token(x, 16)),
        ("w4", "cpu", lambda x: round_per_token(x, 16)),
        ("w8", "onnx", lambda x: x),
        ("w4", "onnx", lambda x: x),
    ],
)
def test_which_activations_are_rounded(form, target, expected):
    x = hidden()
    linear = LinearQuantization(form, WeightFormat(4 if form == "w4" else 8, 16), activation_scale=0.02)
    torch.testing.assert_close(activation_rounding(linear, target)(x), expected(x), rtol=0, atol=0)


@pytest.mark.parametrize(("bits", "block"), [(8, 32), (8, 128), (8, None), (4, 32), (4, 128)])
def test_it_is_what_onnxruntime_computes(bits, block):
    """MatMulNBits at accuracy level 4, as the target `cpu` uses it."""
    layout = WeightFormat(bits, block, negative_scales=bits == 4)
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(64, 768, generator=generator)
    x = torch.randn(5, 768, generator=generator) * torch.rand(768, generator=generator).mul(4).exp()
    taken = block or 256
    scales = nearest_scales(weight, layout)
    codes = encode(weight, scales, layout)
    packed = pack_nibbles(codes ^ -8) if bits == 4 else (codes.int() + 128).to(torch.uint8)  # code + 8, + 128
    node = helper.make_node(
        "MatMulNBits",
        ["x", "codes", "scales"],
        ["y"],
        domain="com.microsoft",
        **{"K": 768, "N": 64, "bits": bits, "block_size": taken, "accuracy_level": 4},
    )
    graph = helper.make_graph(
        [node],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [5, 768])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [5, 64])],
        [
            numpy_helper.from_array(packed.reshape(64, 768 // taken, -1).numpy(), "codes"),
            numpy_helper.from_array(scales.expand(64, 768 // taken).numpy(), "scales"),
        ],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    onnx.checker.check_model(model)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (device,) = session.run(None, {"x": x.numpy()})
    linear = LinearQuantization("w8" if bits == 8 else "w4", layout)
    emulated = (activation_rounding(linear, "cpu")(x) @ round_trip(weight, layout).T).numpy()
    # Only the order of the sums differs; activations left alone would differ by 1e-2.
    assert np.linalg.norm(device - emulated) / np.linalg.norm(device) < 1e-5


@pytest.mark.parametrize("split", [1, 7, 96])
def test_the_table_is_the_same_however_it_is_read(split):
    table = InMemory("embed_tokens.weight", torch.randn(96, 32, generator=torch.Generator().manual_seed(5)))
    device = DeviceTable(table, LinearQuantization("w8", BLOCKS, "mse"))
    assert (device.shape, device.dtype, device.name) == ((96, 32), torch.float32, "embed_tokens.weight")
    pieces = torch.cat([device.read(start, min(start + split, 96)) for start in range(0, 96, split)])
    torch.testing.assert_close(pieces, round_trip(table.tensor, BLOCKS, "mse"), rtol=0, atol=0)


def test_a_table_with_stored_codes_or_none():
    table = InMemory("embed_tokens.weight", torch.randn(96, 32).bfloat16())
    scales = nearest_scales(table.tensor, BLOCKS) * 0.9
    codes = encode(table.tensor, scales, BLOCKS)
    stored = LinearQuantization("w8", BLOCKS, stored=(InMemory("codes", codes), InMemory("scales", scales)))
    expected = decode(codes, scales, BLOCKS)[11:20]
    torch.testing.assert_close(DeviceTable(table, stored).read(11, 20), expected, rtol=0, atol=0)
    kept = DeviceTable(table, LinearQuantization("float")).read(11, 20)
    torch.testing.assert_close(kept, table.tensor[11:20].float(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("linear", "expected"),
    [
        (LinearQuantization("float"), 2 * 64 * 256),
        (LinearQuantization("w8a8-token", WeightFormat(8)), 64 * 256 + 4 * 64),
        (LinearQuantization("w8", WeightFormat(8, 32)), 64 * 256 + 2 * 64 * 8),
        (LinearQuantization("w4", WeightFormat(4, 128)), 64 * 128 + 2 * 64 * 2),
    ],
    ids=["16 bits", "a scale per row", "8 bits in blocks", "4 bits in blocks"],
)
def test_bytes_are_those_of_codes_and_scales(linear, expected):
    assert stored_bytes(linear, 64, 256) == expected


def test_merged_shapes_hold_every_weight_once():
    shapes = merged_shapes(CONFIG)
    assert list(shapes)[:2] == ["embed_tokens", "layers.0.self_attn.qkv_proj"]
    assert len(shapes) == 1 + 4 * CONFIG.num_layers
    matrices = [shape for shape in CONFIG.weight_shapes.values() if len(shape) == 2]
    assert sum(a * b for a, b in shapes.values()) == sum(a * b for a, b in matrices)
