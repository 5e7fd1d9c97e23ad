"""Keys and values in 8 bits, held against the canonical graph with the rounding written out."""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto
from support.graphs import MakeGraph, canonical

from gemma_export.calibration.scales import CacheScales
from gemma_export.errors import BundleError, GraphError
from gemma_export.exporter.bundle import describe_files, write_manifest
from gemma_export.graphs import schedule, spec
from gemma_export.graphs.passes.quantize_cache import quantize_cache
from gemma_export.runtime.bundle import open_bundle
from gemma_export.runtime.kv_cache import KVCache
from gemma_export.runtime.manifest import CacheScales as ManifestScales
from gemma_export.runtime.session import load

Array = npt.NDArray[np.float32]

LAYERS, HEAD_DIM, SLOTS = 2, 16, 16
HEADS = pytest.mark.parametrize("heads", [1, 2, 4], ids=["MQA", "GQA", "MHA"])
CHUNKS = pytest.mark.parametrize(
    "chunks", [(12,), (7, 5), (1, 6, 5), (7, 1, 1, 1, 1, 1)], ids=["whole", "chunks", "odd", "decode"]
)


def coarse(heads: int) -> list[CacheScales]:
    """Scales that differ by layer, part and head.

    A step is a large part of a key, so that the rounding shows, and seldom falls on the edge between two
    codes, where the last digit of a sum decides. The first ones saturate: keys reach 4, 127 steps 2.
    """
    return [
        CacheScales(
            tuple(0.016 * 3 ** (layer + head % 2) for head in range(heads)),
            tuple(0.012 * 5 ** (layer + head % 2) for head in range(heads)),
        )
        for layer in range(LAYERS)
    ]


def lowered(raw_graph: MakeGraph, heads: int) -> ir.Model:
    model = canonical(raw_graph, heads)
    schedule.run(model, (*schedule.ONNXRUNTIME, *schedule.FUNCTIONS))
    return model


def emulated(raw_graph: MakeGraph, heads: int, scales: Sequence[CacheScales]) -> ir.Model:
    """The canonical graph, whose fp32 cache holds what the codes stand for."""
    model = canonical(raw_graph, heads)
    graph = model.graph
    for node in [node for node in graph if node.op_type == "TensorScatter"]:
        _, layer, part = str(node.outputs[0].name).split(".")
        numbers = np.array(getattr(scales[int(layer)], part), np.float32).reshape(1, -1, 1, 1)
        scale, low, high = (
            ir.node("Constant", [], attributes={"value": ir.tensor(np.asarray(value, np.float32))})
            for value in (numbers, -128, 127)
        )
        steps = ir.node("Div", [node.inputs[1], scale.outputs[0]])
        rounded = ir.node("Round", steps.outputs)
        clipped = ir.node("Clip", [rounded.outputs[0], low.outputs[0], high.outputs[0]])
        decoded = ir.node("Mul", [clipped.outputs[0], scale.outputs[0]])
        graph.insert_before(node, [scale, low, high, steps, rounded, clipped, decoded])
        node.replace_input_with(1, decoded.outputs[0])
    return model


class Runner:
    """Runs a graph as the runtime does: past and present are one buffer."""

    def __init__(self, model: ir.Model, heads: int, batch: int = 1) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        self.session = ort.InferenceSession(
            ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        dtype = model.graph.inputs[2].dtype
        shape = {"kv_heads": heads, "max_length": SLOTS, "head_dim": HEAD_DIM}
        scales = coarse(heads) if dtype == ir.DataType.INT8 else ()
        self.cache = KVCache.allocate(
            layers=LAYERS, batch=batch, dtype="int8" if scales else "float32", scales=scales, **shape
        )

    def step(self, tokens: Sequence[Sequence[int]], row: int | None = None) -> Array:
        """Logits [B, T, V] of the next tokens, of all rows or of one."""
        cache = self.cache if row is None else self.cache.row(row)
        ids = np.array(tokens, np.int64)
        positions = cache.lengths[:, None] + np.arange(ids.shape[1])
        binding = self.session.io_binding()
        binding.bind_cpu_input("input_ids", ids)
        binding.bind_cpu_input("position_ids", positions)
        for layer in range(LAYERS):
            for part, buffers in (("key", cache.key_buffers), ("value", cache.value_buffers)):
                value = ort_value(buffers[layer])
                binding.bind_ortvalue_input(f"past_key_values.{layer}.{part}", value)
                binding.bind_ortvalue_output(f"present.{layer}.{part}", value)
        logits = np.zeros((*ids.shape, 96), np.float32)
        binding.bind_ortvalue_output("logits", ort_value(logits))
        self.session.run_with_iobinding(binding)
        cache.advance(ids.shape[1])
        return logits


def ort_value(array: npt.NDArray[np.generic]) -> object:
    """An OrtValue over the array's own memory."""
    elements = {"float32": TensorProto.FLOAT, "int8": TensorProto.INT8}
    return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array, elements[array.dtype.name])


def relative_error(found: Array, expected: Array) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def fitting(cache: KVCache, layers: int) -> list[CacheScales]:
    """Scales with which nothing that a cache holds is clipped."""
    parts = [
        [np.abs(part(layer)).max((0, 2, 3)) / 127 for part in (cache.keys, cache.values)]
        for layer in range(layers)
    ]
    return [CacheScales(tuple(key.tolist()), tuple(value.tolist())) for key, value in parts]


def tokens(*shape: int) -> list[list[int]]:
    return [[int(token) for token in row] for row in np.random.default_rng(3).integers(0, 96, shape)]


@HEADS
def test_every_layer_and_the_contract(raw_graph: MakeGraph, heads: int) -> None:
    model = lowered(raw_graph, heads)
    assert quantize_cache(model, coarse(heads)) == LAYERS
    spec.CPU.check(model)
    for value in (*model.graph.inputs[2:], *model.graph.outputs[1:]):
        assert value.dtype == ir.DataType.INT8
    assert model.graph.outputs[0].dtype == ir.DataType.FLOAT


@HEADS
@CHUNKS
def test_says_what_the_rounding_written_out_says(
    raw_graph: MakeGraph, heads: int, chunks: tuple[int, ...]
) -> None:
    scales, (text,) = coarse(heads), tokens(1, sum(chunks))
    model = lowered(raw_graph, heads)
    quantize_cache(model, scales)
    quantized = Runner(model, heads)
    written_out = Runner(emulated(raw_graph, heads, scales), heads)
    exact = Runner(lowered(raw_graph, heads), heads)
    position = 0
    for size in chunks:
        step = [text[position : position + size]]
        found, expected, unrounded = quantized.step(step), written_out.step(step), exact.step(step)
        # Sums of fp32 in another order.
        assert relative_error(found, expected) < 1e-5
        assert relative_error(found, unrounded) > 1e-3
        position += size
    for layer in range(LAYERS):
        for part in ("keys", "values"):
            found, expected = getattr(quantized.cache, part)(layer), getattr(written_out.cache, part)(layer)
            assert found.shape == expected.shape == (1, heads, len(text), HEAD_DIM)
            # The same codes: a step is a hundredth at least.
            np.testing.assert_allclose(found, expected, atol=1e-5)
    codes = quantized.cache.key_buffers[0][:, 0]
    assert (codes.min(), codes.max()) == (-128, 127)
    assert not quantized.cache.key_buffers[0][:, :, len(text) :].any()


@HEADS
def test_rows_of_different_lengths_decode_together(raw_graph: MakeGraph, heads: int) -> None:
    scales = coarse(heads)
    model = lowered(raw_graph, heads)
    quantize_cache(model, scales)
    together = Runner(model, heads, batch=3)
    emulation = emulated(raw_graph, heads, scales)
    alone = [Runner(emulation, heads) for _ in range(3)]
    for row, prompt in enumerate(([5, 9, 70], [8], [1, 2, 3, 4, 95, 6, 7])):
        together.step([prompt], row)
        alone[row].step([prompt])
    assert together.cache.lengths.tolist() == [3, 1, 7]
    for step in tokens(4, 3):
        found = together.step([[token] for token in step])
        expected = [runner.step([[token]])[0] for runner, token in zip(alone, step, strict=True)]
        assert relative_error(found, np.stack(expected)) < 1e-5


def test_scales_that_fit_lose_little(raw_graph: MakeGraph) -> None:
    (text,) = tokens(1, 12)
    exact = Runner(lowered(raw_graph, 2), 2)
    expected = exact.step([text])
    scales = fitting(exact.cache, LAYERS)
    model = lowered(raw_graph, 2)
    quantize_cache(model, scales)
    found = Runner(model, 2).step([text])
    # Half a step is a 254th of the largest key; a sum over many averages it out.
    assert 1e-4 < relative_error(found, expected) < 1e-2


@pytest.mark.parametrize(
    ("scales", "message"),
    [
        pytest.param(coarse(2)[:1], "scales of 1 layers, and the graph has 2 layers", id="layers"),
        pytest.param(coarse(1), "key_scale of 1 KV heads, and the graph has 2", id="heads"),
        pytest.param([coarse(2)[0], CacheScales((1.0, 1.0), (1.0, 0.0))], "layers.1.*value_scale", id="zero"),
        pytest.param([CacheScales((1.0, float("nan")), (1.0, 1.0))] * 2, "layers.0.*key_scale", id="nan"),
    ],
)
def test_scales_of_something_else_are_refused(
    raw_graph: MakeGraph, scales: list[CacheScales], message: str
) -> None:
    with pytest.raises(GraphError, match=message):
        quantize_cache(lowered(raw_graph, 2), scales)


def another_reader_of_the_past(graph: ir.Graph) -> None:
    """Illegal (1)."""
    graph.append(ir.node("Identity", [graph.inputs[3]]))


def another_reader_of_the_present(graph: ir.Graph) -> None:
    """Illegal (1)."""
    graph.append(ir.node("Identity", [graph.outputs[1]]))


def a_cache_in_16_bits(graph: ir.Graph) -> None:
    """Illegal (2)."""
    graph.inputs[2].dtype = ir.DataType.FLOAT16


def no_fused_attention(graph: ir.Graph) -> None:
    """Illegal (1)."""
    node = next(node for node in graph if node.op_type == "GroupQueryAttention")
    node.op_type = "MultiHeadAttention"


@pytest.mark.parametrize(
    "spoil",
    [
        another_reader_of_the_past,
        another_reader_of_the_present,
        a_cache_in_16_bits,
        no_fused_attention,
    ],
    ids=lambda spoil: spoil.__name__,
)
def test_a_layer_it_does_not_know_is_left_alone(
    raw_graph: MakeGraph, spoil: Callable[[ir.Graph], None]
) -> None:
    model = lowered(raw_graph, 1)
    spoil(model.graph)
    before = [value.dtype for value in model.graph.inputs]
    assert quantize_cache(model, coarse(1)) == LAYERS - 1
    assert [value.dtype for value in model.graph.inputs] == [*before[:4], ir.DataType.INT8, ir.DataType.INT8]


def test_attention_that_was_not_lowered_is_left_alone(raw_graph: MakeGraph) -> None:
    assert quantize_cache(canonical(raw_graph, 1), coarse(1)) == 0


TEXT = "MENENIUS:\nWhat is the matter, you dissentious rogues,\nThat, rubbing the poor itch of your opinion,"


@pytest.fixture(scope="module")
def bundles(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The model that ships, with its cache in fp32 and in int8."""
    folder = Path(shutil.copytree(tiny_bundle, tmp_path_factory.mktemp("int8") / "cache"))
    session = load(tiny_bundle, threads=1)
    cache = session.new_cache()
    session.step([session.tokenizer.encode(TEXT)], cache)
    manifest = open_bundle(tiny_bundle).manifest
    scales = fitting(cache, manifest.model.num_layers)
    model = ir.load(folder / manifest.graph.file)
    assert quantize_cache(model, scales) == manifest.model.num_layers
    ir.save(model, folder / manifest.graph.file)
    manifest = replace(
        manifest,
        cache_dtype="int8",
        cache_scales=tuple(ManifestScales(layer.key, layer.value) for layer in scales),
        files=describe_files(folder, {}),
    )
    write_manifest(folder, manifest)
    return tiny_bundle, folder


def test_a_bundle_with_an_int8_cache(bundles: tuple[Path, Path]) -> None:
    wide, narrow = (load(folder, threads=1) for folder in bundles)
    prompt = wide.tokenizer.encode(TEXT)
    filled, codes = wide.new_cache(), narrow.new_cache()
    for size, part in ((20, prompt[:20]), (len(prompt) - 20, prompt[20:])):
        expected, found = wide.step([part], filled), narrow.step([part], codes)
        assert filled.length == codes.length >= size
        # Half a step is a 254th of the largest key; a sum over many averages it out.
        assert 1e-4 < relative_error(found, expected) < 2e-2
    assert codes.key_buffers[0].nbytes * 4 == filled.key_buffers[0].nbytes
    for layer, scales in enumerate(codes.scales):
        for head, step in enumerate(scales.key):
            errors = np.abs(codes.keys(layer) - filled.keys(layer))[:, head]
            # The first layer's keys are rounded, and nothing else; later ones are made from rounded ones too.
            assert 0 < errors.max() <= (0.501 if layer == 0 else 3) * step


def test_onnxruntime_genai_runs_it_as_it_is(bundles: tuple[Path, Path]) -> None:
    og = pytest.importorskip("onnxruntime_genai")
    session, model = load(bundles[1], threads=1), og.Model(str(bundles[1]))
    prompt = session.tokenizer.encode(TEXT)[:16]
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=len(prompt) + 40)
    generator = og.Generator(model, parameters)
    generator.append_tokens(prompt)
    while not generator.is_done():
        generator.generate_next_token()
    expected = session.generate_tokens(prompt, max_new_tokens=40)
    assert [int(token) for token in generator.get_sequence(0)[len(prompt) :]] == expected
    assert len(expected) > 20


def test_a_bundle_without_the_scales_is_refused(bundles: tuple[Path, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(bundles[1], tmp_path / "copy"))
    manifest = open_bundle(folder).manifest
    for scales in ((), manifest.cache_scales[1:]):
        write_manifest(folder, replace(manifest, cache_scales=scales))
        with pytest.raises(BundleError, match="the manifest has the scales of"):
            load(folder)
    write_manifest(folder, replace(manifest, cache_dtype="float32"))
    with pytest.raises(BundleError, match="scales of a cache that is float32"):
        load(folder)
