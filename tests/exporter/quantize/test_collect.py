"""From text to a table of scales: what it says of a model, that it is true, and what is left behind."""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from gemma_export.calibration.recipe import Decision, Layer, Recipe
from gemma_export.calibration.scales import CalibrationText, ScaleTable, graph_digest
from gemma_export.errors import CalibrationError, CheckpointError, ScalesError, UsageError
from gemma_export.exporter import events
from gemma_export.exporter.checkpoints.checkpoint import LazyTensor, RandomCheckpoint
from gemma_export.exporter.checkpoints.weights import canonical_weights
from gemma_export.exporter.config import GemmaConfig
from gemma_export.exporter.decoder import DecoderLayer
from gemma_export.exporter.parity.reference import Array, Reference, empty_module
from gemma_export.exporter.quantize import collect
from gemma_export.exporter.quantize.collect import CODES_FILE, calibrate, quantization_of, uncalibrated
from gemma_export.exporter.quantize.emulate import device_linears, merged_layers
from gemma_export.exporter.request import Products, Scheme, scheme_for
from gemma_export.exporter.source import Source
from gemma_export.graphs.tensors import InMemory

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = GemmaConfig(
    name="random",
    vocab_size=300,
    hidden_size=64,
    num_layers=2,
    num_query_heads=4,
    num_kv_heads=2,
    head_dim=16,
    intermediate_size=96,
    context_length=64,
)
PER_TOKEN = Scheme(
    "w8a8-dynamic",
    "int8",
    "float32",
    "float32",
    Products("w8a8-token", 8, (None,), 32, otherwise="w8", otherwise_block=32),
)
STATIC = Scheme(
    "w8a8", "int8", "float16", "float16", Products("w8a8-tensor", 8, (None,), None, otherwise="w8")
)
FOUR_BITS = Scheme("w4a16", "int4", "float32", "float32", Products("w4", 4, (32, 16), 32))
TARGETS = {PER_TOKEN.name: "cpu", STATIC.name: "onnx", FOUR_BITS.name: "cpu"}
SEQUENCES = [
    torch.randint(3, 300, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    for length in (40, 7, 1, 33, 64)
]
TEXT = CalibrationText("some text", 5, 145, 0, "0" * 64)
OUTLIERS = [3, 17, 40]


def source(**changes: Tensor) -> Source:
    """Random weights, some of them replaced."""
    checkpoint = RandomCheckpoint(CONFIG, 3, torch.bfloat16)
    weights: dict[str, LazyTensor] = dict(canonical_weights(checkpoint, CONFIG))
    for name, tensor in changes.items():
        weights[name] = InMemory(name, tensor)
    return Source(checkpoint, CONFIG, weights, None)


def whole(weights: Mapping[str, LazyTensor], name: str) -> Tensor:
    return weights[name].read(0, weights[name].shape[0]).float()


def with_outliers() -> Source:
    """The same function with three channels of every norm 64 times larger."""
    weights, changes = source().weights, {}
    for i in range(CONFIG.num_layers):
        readers = {"input_layernorm": "qkv", "post_attention_layernorm": ("gate", "up")}
        for norm, parts in readers.items():
            gain = whole(weights, f"layers.{i}.{norm}.weight")
            gain[OUTLIERS] = 64 * (1 + gain[OUTLIERS]) - 1
            changes[f"layers.{i}.{norm}.weight"] = gain
            room = "self_attn" if norm == "input_layernorm" else "mlp"
            for part in parts:
                name = f"layers.{i}.{room}.{part}_proj.weight"
                changes[name] = whole(weights, name)
                changes[name][:, OUTLIERS] /= 64
    return source(**changes)


def table(
    folder: Path,
    scheme: Scheme = PER_TOKEN,
    model: Source | None = None,
    listener: events.Listener = events.ignore,
    block: int | None = None,
) -> ScaleTable:
    return calibrate(
        model or source(),
        TARGETS[scheme.name],
        scheme,
        SEQUENCES,
        block=block,
        text=TEXT,
        observer="absmax",
        codes_folder=folder,
        listener=listener,
    )


every_scheme = pytest.mark.parametrize("scheme", [PER_TOKEN, STATIC, FOUR_BITS], ids=lambda s: s.name)


@every_scheme
def test_a_table_says_what_it_is_of(scheme, tmp_path):
    found = table(tmp_path, scheme)
    assert (found.target, found.scheme, found.text) == (TARGETS[scheme.name], scheme.name, TEXT)
    assert found.graph == graph_digest(CONFIG)
    assert found.checkpoint == source().checkpoint.digest()
    assert list(found.linears) == [
        *(f"layers.{i}.{kind}" for i in range(2) for kind in merged_layers(CONFIG)),
        "embed_tokens",
    ]
    allowed = {scheme.products.form, scheme.products.otherwise, "w8"}
    assert {linear.form for linear in found.linears.values()} <= allowed
    for linear in found.linears.values():
        assert linear.error is not None
        assert 0 < linear.error < 0.1
        assert (linear.activation_scale is not None) == (linear.form == "w8a8-tensor")
    head = found.linears["embed_tokens"]
    assert (head.form, head.method, head.block) == ("w8", "nearest", scheme.products.table_block)
    assert ScaleTable.from_json(found.to_json()) == found


@every_scheme
def test_it_is_the_same_each_time(scheme, tmp_path):
    assert table(tmp_path, scheme) == table(tmp_path, scheme)


@every_scheme
@pytest.mark.parametrize("model", [source, with_outliers], ids=["plain", "outliers"])
def test_the_layers_compute_as_closely_as_the_table_says(scheme, model, tmp_path):
    """Against the layers themselves: vectors go where they belong, codes stand for the rows they should."""
    made = model()
    found = table(tmp_path, scheme, made)
    quantization = quantization_of(found, tmp_path / CODES_FILE if found.codes else None, found.target)
    inputs = observed_inputs(made)
    layer = empty_module(lambda: DecoderLayer(CONFIG))
    for i in range(CONFIG.num_layers):
        with torch.inference_mode():
            Reference(CONFIG, made.weights).load(layer, f"layers.{i}")
            for name, parts in device_linears(layer, f"layers.{i}", quantization, found.target).items():
                x = inputs[f"layers.{i}.{merged_layers(CONFIG)[name.split('.', 2)[2]].x}"]
                exact = torch.cat([x @ part.module.weight.T for part in parts], dim=-1)
                actual = torch.cat([part.forward(x) for part in parts], dim=-1)
                error = float(((actual - exact).square().sum(1) / exact.square().sum(1)).mean())
                # Few tokens: all are in the sample; but one with next to no output counts less there.
                assert error == pytest.approx(found.linears[name].error, rel=0.02), name


def observed_inputs(made: Source) -> dict[str, Tensor]:
    seen: dict[str, list[Tensor]] = {}
    Reference(CONFIG, made.weights).run(
        SEQUENCES,
        observe=lambda name, x: seen.setdefault(name, []).append(
            torch.from_numpy(x.copy()).flatten(0, -2) if x.ndim == 3 else torch.empty(0)
        ),
        wanted=frozenset(merged.x for merged in merged_layers(CONFIG).values()),
    )
    return {name: torch.cat(parts) for name, parts in seen.items()}


@every_scheme
def test_outliers_cost_next_to_nothing(scheme, tmp_path):
    plain, planted = table(tmp_path, scheme), table(tmp_path, scheme, with_outliers())
    norms = {f"layers.{i}.{n}" for i in range(2) for n in ("input_layernorm", "post_attention_layernorm")}
    assert norms <= set(planted.smoothing)
    for name in norms:
        vector = torch.tensor(planted.smoothing[name])
        rest = [i for i in range(64) if i not in OUTLIERS]
        assert vector[OUTLIERS].min() > 5 * vector[rest].median()
    for name, linear in plain.linears.items():
        assert planted.linears[name].form == linear.form
        assert planted.linears[name].error < 1.5 * linear.error


def test_codes_are_in_a_file_that_the_table_names(tmp_path):
    found = table(tmp_path, FOUR_BITS)
    assert [path.name for path in tmp_path.iterdir()] == [CODES_FILE]
    assert found.codes == hashlib.sha256((tmp_path / CODES_FILE).read_bytes()).hexdigest()
    chosen = {name for name, linear in found.linears.items() if linear.method == "gptq"}
    assert chosen
    tensors = load_file(tmp_path / CODES_FILE)  # By the format's own library.
    assert set(tensors) == {f"{name}.{part}" for name in chosen for part in ("codes", "scales")}
    quantization = quantization_of(found, tmp_path / CODES_FILE, "cpu")
    for name in chosen:
        linear = quantization.linears[name]
        assert linear.stored is not None
        for stored, part in zip(linear.stored, ("codes", "scales"), strict=True):
            assert torch.equal(stored.read(0, stored.shape[0]), tensors[f"{name}.{part}"])
        rows, columns = tensors[f"{name}.codes"].shape
        assert tensors[f"{name}.codes"].dtype == torch.int8
        assert tensors[f"{name}.scales"].shape == (rows, columns // 32)


def test_another_block_is_as_good_as_asked_for(tmp_path):
    found = table(tmp_path, FOUR_BITS, block=16)
    assert {linear.block for name, linear in found.linears.items() if name != "embed_tokens"} == {16}


@pytest.mark.parametrize("scheme", [PER_TOKEN, STATIC], ids=lambda s: s.name)
def test_without_codes_there_is_no_file(scheme, tmp_path):
    assert table(tmp_path, scheme).codes is None
    assert not list(tmp_path.iterdir())


def test_the_cache_has_a_scale_for_each_head(tmp_path):
    run = Reference(CONFIG, source().weights).run(SEQUENCES)
    for layer, scales in enumerate(table(tmp_path).cache):
        for kind, found in (("keys", scales.key), ("values", scales.value)):
            arrays = [getattr(run, kind)(layer, i) for i in range(len(SEQUENCES))]
            largest = [max(float(abs(array[head]).max()) for array in arrays) for head in range(2)]
            assert found == pytest.approx([value / 127 for value in largest])


def test_blocks_of_queries_change_nothing(tmp_path, monkeypatch):
    whole_sequences = table(tmp_path)
    monkeypatch.setattr("gemma_export.exporter.parity.reference.QUERY_BLOCK", 9)
    pieces = table(tmp_path)
    for name, linear in whole_sequences.linears.items():
        assert pieces.linears[name].form == linear.form
        assert pieces.linears[name].error == pytest.approx(linear.error, rel=1e-2)
    assert pieces.cache[1].key == pytest.approx(whole_sequences.cache[1].key, rel=1e-5)


def test_tells_how_far_it_is(tmp_path):
    told: list[events.Event] = []
    table(tmp_path, listener=told.append)
    assert isinstance(told[0], events.StageStarted)
    assert told[0].stage == "calibration"
    progress = [event for event in told if isinstance(event, events.StageProgress)]
    assert [event.done for event in progress] == sorted(event.done for event in progress)
    tokens = sum(map(len, SEQUENCES))
    assert (progress[-1].done, progress[-1].total, progress[-1].unit) == (tokens, tokens, "tokens")
    assert isinstance(told[-1], events.StageFinished)
    assert told[-1].facts["tokens"] == tokens
    assert told[-1].facts["w8a8-token"] > 0


@pytest.mark.parametrize("target", ["cpu", "onnx"])
def test_only_the_blocks_of_onnxruntime_have_negative_scales(target, tmp_path):
    found = replace(uncalibrated(source(), "cpu", FOUR_BITS), target=target)
    quantization = quantization_of(found, None, target)
    assert {linear.format.negative_scales for linear in quantization.linears.values()} == {target == "cpu"}
    assert {linear.format.bits for linear in quantization.linears.values()} == {4, 8}
    rows = quantization_of(uncalibrated(source(), "cpu", PER_TOKEN), None, "cpu")
    assert not rows.linears["layers.0.self_attn.o_proj"].format.negative_scales


def test_what_keeps_16_bits_has_no_format(tmp_path):
    found = table(tmp_path)
    kept = replace(found.linears["layers.1.mlp.down_proj"], form="float", method="none")
    found = replace(found, linears={**found.linears, "layers.1.mlp.down_proj": kept})
    linear = quantization_of(found, None, "cpu").linears["layers.1.mlp.down_proj"]
    assert (linear.form, linear.format) == ("float", None)


def test_a_table_without_its_codes_is_refused(tmp_path):
    with pytest.raises(ScalesError, match=r"layers\.0\.self_attn\.qkv_proj"):
        quantization_of(table(tmp_path, FOUR_BITS), None, "cpu")


@pytest.mark.parametrize(
    ("scheme", "form", "method"),
    [(PER_TOKEN, "w8a8-token", "nearest"), (STATIC, "w8", "nearest"), (FOUR_BITS, "w4", "mse")],
    ids=lambda value: value.name if isinstance(value, Scheme) else None,
)
def test_without_text_it_follows_from_the_weights(scheme, form, method):
    found = uncalibrated(source(), TARGETS[scheme.name], scheme)
    assert found.text is None
    assert not found.smoothing
    assert not found.cache
    assert found.codes is None
    head = found.linears["embed_tokens"]
    assert (head.form, head.method, head.block) == ("w8", "nearest", scheme.products.table_block)
    others = [linear for name, linear in found.linears.items() if name != "embed_tokens"]
    assert len(others) == 8
    assert {(linear.form, linear.method, linear.block) for linear in others} == {
        (form, method, scheme.products.blocks[0])
    }
    assert ScaleTable.from_json(found.to_json()) == found


def test_a_scheme_that_needs_text_says_so():
    alone = replace(STATIC, products=replace(STATIC.products, otherwise=None))
    with pytest.raises(UsageError, match="only calibration finds"):
        uncalibrated(source(), "onnx", alone)


def test_no_text_is_refused(tmp_path):
    with pytest.raises(CalibrationError, match="no text"):
        calibrate(
            source(),
            "cpu",
            PER_TOKEN,
            [],
            block=None,
            text=TEXT,
            observer="absmax",
            codes_folder=tmp_path,
        )


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("layers.1.mlp.up_proj.weight", CalibrationError),
        ("layers.1.mlp.down_proj.weight", CheckpointError),
        ("norm.weight", CalibrationError),
    ],
)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_leaves_nothing_behind(name, error, value, tmp_path):
    broken = whole(source().weights, name)
    broken[0, ...] = value
    with pytest.raises(error):
        table(tmp_path, FOUR_BITS, source(**{name: broken}))
    assert not list(tmp_path.iterdir())


def test_blocks_that_do_not_divide_are_refused_before_anything_is_run(tmp_path, monkeypatch):
    monkeypatch.setattr(Reference, "run", None)
    with pytest.raises(UsageError, match=r"Blocks of 128 columns do not divide the 64 of .*qkv") as caught:
        table(tmp_path, scheme_for("cpu", "int4"))
    assert caught.value.hint == "Choose --block 32."  # 64 does not divide the 96 of the down projection.
    with pytest.raises(UsageError, match="embed_tokens"):
        table(tmp_path, replace(PER_TOKEN, products=replace(PER_TOKEN.products, table_block=256)))


def test_a_form_whose_blocks_do_not_divide_is_no_way_out(tmp_path):
    scheme = replace(PER_TOKEN, products=replace(PER_TOKEN.products, otherwise_block=64))
    found = table(tmp_path, scheme)
    for i in range(2):
        assert found.linears[f"layers.{i}.mlp.down_proj"].form == "w8a8-token"  # 64 does not divide 96.


def test_one_layer_is_looked_at_at_a_time(tmp_path, monkeypatch):
    alive: list[int] = []
    original = collect._Collector.after_layer

    def counted(self: collect._Collector, index: int) -> None:
        alive.append(len(self._inputs))
        original(self, index)
        assert not self._inputs

    monkeypatch.setattr(collect._Collector, "after_layer", counted)
    table(tmp_path)
    assert alive == [4, 4]


def test_ways_are_compared_in_fp32_whatever_the_text_passes_in(tmp_path, monkeypatch):
    """An operand in bfloat16 would add a percent to the price of 8 bits."""
    seen: dict[str, set[str]] = {"observe": set(), "decide": set()}
    observe, decide = collect._Collector.observe, collect.decide

    def observed(self: collect._Collector, name: str, array: Array) -> None:
        seen["observe"].add(torch.get_float32_matmul_precision())
        observe(self, name, array)

    def decided(layer: Layer, recipe: Recipe) -> Decision:
        seen["decide"].add(torch.get_float32_matmul_precision())
        return decide(layer, recipe)

    monkeypatch.setattr(collect._Collector, "observe", observed)
    monkeypatch.setattr(collect, "decide", decided)
    table(tmp_path)
    assert seen == {"observe": {"medium"}, "decide": {"highest"}}
    assert torch.get_float32_matmul_precision() == "highest"
