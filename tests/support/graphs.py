"""Small graphs to run passes on: written as ONNX text, or traced from the real decoder."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime as ort
import torch

from gemma_export.exporter.config import GemmaConfig
from gemma_export.graphs import schedule
from gemma_export.graphs.tensors import InMemory, StreamedTensor

Array = npt.NDArray[np.float32]
MakeGraph = Callable[..., ir.Model]
"""The fixture `raw_graph`."""

HEADER = '<ir_version: 11, opset_import: ["" : 24]>\n'


def small_config(**changes: object) -> GemmaConfig:
    """Two layers of Gemma's form, small enough to read; head_dim is not hidden_size / heads."""
    shape: dict[str, object] = {
        "name": "gemma-small",
        "vocab_size": 96,
        "hidden_size": 32,
        "num_layers": 2,
        "num_query_heads": 4,
        "num_kv_heads": 1,
        "head_dim": 16,
        "intermediate_size": 48,
        "context_length": 64,
    }
    return GemmaConfig(**{**shape, **changes})  # type: ignore[arg-type]


def random_weights(config: GemmaConfig, seed: int = 0) -> dict[str, InMemory]:
    """Weights whose activations stay near 1, by canonical name."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in config.weight_shapes.items():
        scale = 0.2 if len(shape) == 1 else shape[-1] ** -0.5
        weights[name] = InMemory(name, torch.randn(shape, generator=generator) * scale)
    return weights


def cloned(model: ir.Model) -> ir.Model:
    """A clone with types of its own: `clone` shares them, and passes change types."""
    clone = model.clone()
    made = (output for node in clone.graph for output in node.outputs)
    for value in (*clone.graph.inputs, *clone.graph.initializers.values(), *made):
        value.type = None if value.dtype is None else ir.TensorType(value.dtype)
    return clone


def canonical(raw_graph: MakeGraph, num_kv_heads: int = 1) -> ir.Model:
    """The small decoder as the first passes leave it, whatever it is made for."""
    model = raw_graph(num_kv_heads)
    schedule.canonicalize(model)
    return model


def from_text(body: str, **weights: npt.ArrayLike) -> ir.Model:
    """A graph from ONNX text; inputs that `weights` names become streamed initializers."""
    model = ir.from_onnx_text(HEADER + body)
    graph = model.graph
    for name, values in weights.items():
        value = next(value for value in graph.inputs if value.name == name)
        graph.inputs.remove(value)
        tensor = torch.from_numpy(np.asarray(values))
        value.const_value = StreamedTensor(InMemory(name, tensor))
        value.shape, value.dtype = ir.Shape(tensor.shape), value.const_value.dtype
        graph.register_initializer(value)
    return model


def run(
    model: ir.Model, feeds: dict[str, npt.NDArray[np.generic]], folder: Path | None = None
) -> dict[str, Array]:
    """Outputs by name, by onnxruntime without its own fusions; weights in files are those of `folder`.

    What is constant it evaluates: products of blocks give zeros where their scales are no constants.
    """
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.log_severity_level = 3
    if folder is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    session = ort.InferenceSession(
        ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


def decoder_feeds(
    model: ir.Model, *, batch: int, tokens: int, start: int
) -> dict[str, npt.NDArray[np.generic]]:
    """Random tokens at positions from `start` on, over a cache full of random numbers."""
    rng = np.random.default_rng(7)
    positions = np.broadcast_to(np.arange(start, start + tokens, dtype=np.int64), (batch, tokens))
    feeds: dict[str, npt.NDArray[np.generic]] = {
        "input_ids": rng.integers(0, 96, (batch, tokens)),
        "position_ids": positions.copy(),
    }
    for cache in model.graph.inputs[2:]:
        assert cache.shape is not None
        assert cache.dtype is not None
        shape = (batch, *(int(size) for size in cache.shape[1:]))
        feeds[str(cache.name)] = rng.standard_normal(shape).astype(cache.dtype.numpy())
    return feeds


def producer(value: ir.Value | None) -> ir.Node:
    """The node that makes a value."""
    assert value is not None
    node = value.producer()
    assert node is not None
    return node
