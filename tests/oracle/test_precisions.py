"""Every target and precision over the shipped model; and what becomes of numbers that fp16 cannot hold."""

import shutil
from collections.abc import Callable, Collection, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.oracle import RELATIVE_ERROR, SLOTS, relative_error

from gemma_export.errors import ParityError
from gemma_export.exporter import events, pipeline
from gemma_export.exporter.config import tiny_folder
from gemma_export.exporter.parity import measure
from gemma_export.exporter.parity.measure import graph_name
from gemma_export.exporter.parity.reference import Reference
from gemma_export.exporter.parity.report import ParityReport
from gemma_export.exporter.pipeline import BuildResult, build
from gemma_export.exporter.request import SCHEMES, BuildRequest
from gemma_export.exporter.source import open_source
from gemma_export.graphs.passes.emulate_half import emulate_half
from gemma_export.runtime.session import load

BuildOnce = Callable[..., BuildResult]
Weights = dict[str, torch.Tensor]
Plant = Callable[[Weights], None]

FLOATING = [
    (target, precision)
    for (target, precision), (scheme, *_) in SCHEMES.items()
    if scheme.products is None and target not in ("rtx", "tensorrt")
]
"""Targets and precisions without scales: what is quantized is measured elsewhere. The graph of the targets
that are compiled is that of `onnx` (tests/graphs/test_spec_tensorrt.py)."""

LAYER = "layers.2"
NEURON = 7
"""Of the feed-forward layer, where numbers are planted."""


def measured(result: BuildResult) -> ParityReport:
    assert result.report is not None
    return result.report


# The matrix


@pytest.mark.slow
@pytest.mark.parametrize(("target", "precision"), FLOATING, ids=["-".join(key) for key in FLOATING])
def test_every_target_and_precision_passes_the_gate(
    target: str, precision: str, build_once: BuildOnce
) -> None:
    result = build_once(size="tiny", target=target, precision=precision, parity="quick")
    manifest, (scheme,) = result.manifest, SCHEMES[target, precision]
    assert manifest.parity.verdict == "pass"
    assert (manifest.storage_dtype, manifest.compute_dtype, manifest.cache_dtype) == (
        scheme.storage,
        scheme.compute,
        scheme.cache,
    )
    # The weights that ship are small and their activations too: nothing has to stay in fp32.
    assert manifest.fp32_tensors == ()
    assert manifest.bytes.cache_per_row == manifest.model.num_layers * 2 * manifest.model.num_kv_heads * (
        manifest.graph.max_length * manifest.model.head_dim * (4 if scheme.cache == "float32" else 2)
    )
    model = onnx.load(result.path / "model.onnx", load_external_data=False)
    formats = {t.name: onnx.TensorProto.DataType.Name(t.data_type).lower() for t in model.graph.initializer}
    for name, dtype in formats.items():
        if name.endswith(".weight"):
            assert dtype == scheme.storage.replace("float32", "float"), name
        elif name.endswith(".gain"):
            assert dtype == "float", name
        elif name in ("rotary_cos", "rotary_sin"):
            # Of a GPU's fused attention, all operands have one format.
            assert dtype == (scheme.compute if target == "cuda" else "float"), name


@pytest.mark.slow
@pytest.mark.parametrize("target", ["cpu", "onnx"])
def test_16_bits_take_half_the_space(target: str, build_once: BuildOnce) -> None:
    sizes = {}
    for precision in ("fp32", "fp16", "bf16"):
        result = build_once(size="tiny", target=target, precision=precision, parity="quick")
        sizes[precision] = result.manifest.files["model.onnx.data"].size
    model = result.manifest.model
    matrices = (
        model.parameters.embedding + model.parameters.other - model.hidden_size * (2 * model.num_layers + 1)
    )
    # Gains and rotary tables stay in fp32; between tensors is less than a page each.
    assert abs(sizes["fp32"] - sizes["fp16"] - 2 * matrices) < 4096 * 8 * model.num_layers
    assert sizes["fp16"] == sizes["bf16"]


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_16_bit_storage_of_a_bf16_checkpoint_costs_nothing(precision: str, build_once: BuildOnce) -> None:
    full, stored = (
        load(build_once(size="tiny", target="cpu", precision=p, parity="quick").path, threads=1)
        for p in ("fp32", precision)
    )
    tokens = full.tokenizer.encode("It was on a dreary night of November that I beheld the accomplishment")
    caches = full.new_cache(), stored.new_cache()
    for token in tokens:
        expected, found = (s.step([[token]], c) for s, c in zip((full, stored), caches, strict=True))
        if precision == "bf16":
            # The bytes of the checkpoint; the arithmetic is the same.
            np.testing.assert_array_equal(found, expected)
        else:
            # fp16 has more digits than bf16 and a narrower range: weights below 2^-14 lose some of theirs,
            # 2^-25 at most, and these weights are around 2^-5. fp16 arithmetic costs a hundred times this.
            assert relative_error(expected, found) < 3e-6


@pytest.mark.slow
def test_16_bit_arithmetic_costs_more_than_storage_and_less_than_its_budget(build_once: BuildOnce) -> None:
    errors = {}
    for target, precision in FLOATING:
        report = measured(build_once(size="tiny", target=target, precision=precision, parity="quick"))
        errors[target, precision] = report.figures.max_relative_error
        assert report.figures.max_relative_error < report.budget.max_relative_error / 2
    for precision in ("fp16", "bf16"):
        # The twin rounds each value; nothing that is only stored in 16 bits comes near that.
        assert errors["onnx", precision] > 20 * errors["cpu", precision]
    assert max(errors["cpu", "fp32"], errors["onnx", "fp32"]) < RELATIVE_ERROR
    # bfloat16 has three digits fewer than fp16: a factor of 8.
    assert 3 < errors["onnx", "bf16"] / errors["onnx", "fp16"] < 25


# The range of fp16


def tiny_with(plant: Plant, folder: Path) -> Path:
    """The shipped checkpoint in fp32, with something planted in it."""
    folder.mkdir()
    for name in ("config.json", "tokenizer.model"):
        shutil.copyfile(tiny_folder() / name, folder / name)
    weights = {
        name: tensor.float() for name, tensor in load_file(tiny_folder() / "model.safetensors").items()
    }
    plant({name.removeprefix("model."): tensor for name, tensor in weights.items()})
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture
def short_audit(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is planted shows at nearly any token, so a few of each passage are enough."""
    monkeypatch.setattr(measure, "AUDIT_TOKENS", 48)


def a_large_product(weights: Weights) -> None:
    """One neuron's `up` is 2^16 times as large, and what it adds as much smaller: in fp32 nothing changes."""
    weights[f"{LAYER}.mlp.up_proj.weight"][NEURON] *= 2.0**16
    weights[f"{LAYER}.mlp.down_proj.weight"][:, NEURON] /= 2.0**16


def a_large_activation(weights: Weights) -> None:
    """The same of `gate`, which goes through the activation: nearly linear so far from zero."""
    weights[f"{LAYER}.mlp.gate_proj.weight"][NEURON] *= 2.0**16
    weights[f"{LAYER}.mlp.down_proj.weight"][:, NEURON] /= 2.0**16


def a_large_query(weights: Weights) -> None:
    """Two channels that rotate together: the queries' 2^16 times as large, the keys' as much smaller."""
    heads = weights[f"{LAYER}.self_attn.q_proj.weight"].shape[0] // 128
    for channel in (5, 5 + 64):
        for head in range(heads):
            weights[f"{LAYER}.self_attn.q_proj.weight"][head * 128 + channel] *= 2.0**16
        weights[f"{LAYER}.self_attn.k_proj.weight"][channel] /= 2.0**16


def a_large_gain(weights: Weights) -> None:
    """A norm's output leaves the range at one channel, which nothing reads."""
    weights[f"{LAYER}.post_attention_layernorm.weight"][3] = 2.0**19
    for part in ("gate_proj", "up_proj"):
        weights[f"{LAYER}.mlp.{part}.weight"][:, 3] = 0


PLANTS: Mapping[str, tuple[Plant, Collection[str]]] = {
    "up": (a_large_product, {"mlp.gate_up_proj", "mlp.gated"}),
    "gate": (a_large_activation, {"mlp.gate_up_proj", "mlp.gated"}),
    "query": (a_large_query, {"self_attn.qkv_proj", "self_attn.attention"}),
    "gain": (a_large_gain, {"post_attention_layernorm"}),
}


@pytest.mark.slow
@pytest.mark.parametrize("where", PLANTS)
def test_what_leaves_fp16_is_found_and_kept_in_fp32(
    where: str, traced_once: None, short_audit: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant, names = PLANTS[where]
    checkpoint = tiny_with(plant, tmp_path / "checkpoint")
    notes: list[str] = []

    def listen(event: events.Event) -> None:
        if isinstance(event, events.Note):
            notes.append(event.text)

    request = BuildRequest(checkpoint=checkpoint, output=tmp_path / "bundle", target="onnx", precision="fp16")
    result = build(request, listen)
    assert result.manifest.parity.verdict == "pass"
    assert set(result.manifest.fp32_tensors) == {f"{LAYER}.{name}" for name in names}
    assert all(note.startswith(f"{LAYER}.") and "kept in fp32" in note for note in notes)
    assert notes

    # It is the audit that saves it.
    monkeypatch.setattr(pipeline, "audit_range", lambda *_: frozenset())
    request = BuildRequest(checkpoint=checkpoint, output=tmp_path / "lost", target="onnx", precision="fp16")
    with pytest.raises(ParityError, match="NaN or infinite"):
        build(request)
    assert not (tmp_path / "lost").exists()


@pytest.mark.slow
def test_values_that_leave_the_caches_format_are_no_bundle(
    traced_once: None, short_audit: None, tmp_path: Path
) -> None:
    """The cache's format is the contract's: what does not fit into it cannot be kept, and is refused."""

    def plant(weights: Weights) -> None:
        weights[f"{LAYER}.self_attn.v_proj.weight"][7] *= 2.0**16
        weights[f"{LAYER}.self_attn.o_proj.weight"][:, 7::128] /= 2.0**16

    checkpoint = tiny_with(plant, tmp_path / "checkpoint")
    with pytest.raises(ParityError, match="cached values of layer 2"):
        build(BuildRequest(checkpoint=checkpoint, output=tmp_path / "b", target="onnx", precision="fp16"))
    build(BuildRequest(checkpoint=checkpoint, output=tmp_path / "b", target="onnx", precision="bf16"))


@pytest.mark.slow
@pytest.mark.parametrize("target", ["cpu", "onnx"])
def test_a_weight_beyond_fp16_is_kept_in_fp32(
    target: str, traced_once: None, short_audit: None, tmp_path: Path
) -> None:
    def plant(weights: Weights) -> None:
        # Nothing reads the neuron that it makes.
        weights[f"{LAYER}.mlp.up_proj.weight"][NEURON] = 0
        weights[f"{LAYER}.mlp.up_proj.weight"][NEURON, 0] = 1e5
        weights[f"{LAYER}.mlp.down_proj.weight"][:, NEURON] = 0

    checkpoint = tiny_with(plant, tmp_path / "checkpoint")
    result = build(
        BuildRequest(checkpoint=checkpoint, output=tmp_path / "b", target=target, precision="fp16")
    )
    kept = f"{LAYER}.mlp.gate_up_proj.weight"
    assert kept in result.manifest.fp32_tensors
    assert result.manifest.parity.verdict == "pass"
    model = onnx.load(result.path / "model.onnx", load_external_data=False)
    formats = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    assert formats.pop(kept) == onnx.TensorProto.FLOAT
    assert all(
        dtype == onnx.TensorProto.FLOAT16 for name, dtype in formats.items() if name.endswith(".weight")
    )


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mqa", "gemma2"])
def test_what_the_audit_sees_has_a_name_in_the_graph(
    family: str, build_once: BuildOnce, checkpoint_of: Callable[[str], Path]
) -> None:
    # A name that the graph does not know would be kept in vain.
    source = open_source(checkpoint_of(family))
    seen: set[str] = set()
    run = Reference(source.config, source.weights).run([[2, 5, 9]], observe=lambda name, _: seen.add(name))
    run.logits(0)
    run.observe_logits()
    result = build_once(checkpoint=checkpoint_of(family), target="onnx", logits="all", max_length=SLOTS)
    model = onnx.load(result.path / "model.onnx", load_external_data=False)
    names = {output for node in model.graph.node for output in node.output}
    # The scaled embedding has no name of its own: it is always in fp32.
    assert {graph_name(name) for name in seen - {"embedding"}} <= names


# The twin


@cache
def numbers() -> Mapping[str, Any]:
    """Over the whole range of fp16, subnormals included, and sums that overflow it."""
    rng = np.random.default_rng(0)
    x, y, z = (rng.standard_normal(4096) * 2.0 ** rng.integers(-20, 15, 4096) for _ in range(3))
    return {"x": x, "y": y, "z": z}


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_the_twin_rounds_as_arithmetic_in_16_bits_does(name: str) -> None:
    narrow = np.dtype(np.float16) if name == "float16" else np.dtype(ml_dtypes.bfloat16)
    model = ir.from_onnx_text(f"""<ir_version: 11, opset_import: ["" : 24]>
        rounded ({name}[4096] x, {name}[4096] y, {name}[4096] z) => (float[4096] out)
        <{name}[4096] sum, {name}[4096] product, float[4096] wide, float[4096] root, {name}[4096] back>
        {{
            sum = Add(x, y)
            product = Mul(sum, z)
            wide = Cast<to = 1>(product)
            root = Abs(wide)
            back = Cast<to = {10 if name == "float16" else 16}>(root)
            out = Cast<to = 1>(back)
        }}""")
    # Add and Mul; the cast of what is already of that format is a rounding that changes nothing.
    assert emulate_half(model) == 3
    operands = {key: value.astype(narrow) for key, value in numbers().items()}
    feeds = {key: value.astype(np.float32) for key, value in operands.items()}
    # With all of onnxruntime's optimizations, as a bundle is run: none may take the roundings away.
    session = onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    (found,) = session.run(None, feeds)
    with np.errstate(over="ignore"):
        expected = np.abs((operands["x"] + operands["y"]) * operands["z"]).astype(np.float32)
        once = np.abs((feeds["x"] + feeds["y"]) * feeds["z"]).astype(narrow).astype(np.float32)
    np.testing.assert_array_equal(found, expected)
    assert (once != expected).mean() > 0.1, "rounding at the end only would look the same"


def test_the_twin_sums_products_in_fp32() -> None:
    model = ir.from_onnx_text("""<ir_version: 11, opset_import: ["" : 24]>
        product (float16[3, 300] a, float16[300, 5] b) => (float[3, 5] out)
        <float16[3, 5] c>
        { c = MatMul(a, b)
          out = Cast<to = 1>(c) }""")
    assert emulate_half(model) == 1
    rng = np.random.default_rng(1)
    feeds = {"a": rng.standard_normal((3, 300)), "b": rng.standard_normal((300, 5))}
    feeds = {name: value.astype(np.float16).astype(np.float32) for name, value in feeds.items()}
    session = onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    (found,) = session.run(None, feeds)
    exact = feeds["a"].astype(np.float64) @ feeds["b"].astype(np.float64)
    # One rounding to 11 digits, of a sum that is right to some 2^-20: half a step, a hair more near a tie.
    steps = np.spacing(exact.astype(np.float16)).astype(np.float64)
    assert (np.abs(found - exact) <= 0.51 * steps).all()
    np.testing.assert_array_equal(found, found.astype(np.float16).astype(np.float32))
