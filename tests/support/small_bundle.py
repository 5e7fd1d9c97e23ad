"""A hand-made bundle around a small Gemma-shaped graph with random weights, for tests of the runtime.

It keeps the contract of the canonical graph and shares no code with the exporter. The head is not tied to
the embedding, so that greedy text wanders instead of repeating its last token.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

import gemma_export.exporter.tiny

TOKENIZER = Path(gemma_export.exporter.tiny.__file__).with_name("tokenizer.model")

ONNX_TYPE = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "bfloat16": TensorProto.BFLOAT16,
    "int64": TensorProto.INT64,
}


@dataclass(frozen=True)
class Shape:
    """The size of the small model, and what its bundle promises.

    With a window the first layer is local; with a chunk its cache rolls, for steps of so many tokens.
    """

    layers: int = 2
    hidden: int = 32
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    feed_forward: int = 64
    vocabulary: int = 2048
    slots: int = 64
    logits: str = "all"
    cache_dtype: str = "float32"
    seed: int = 0
    window: int | None = None
    chunk: int | None = None

    @property
    def layer_slots(self) -> list[int]:
        """Slots of each layer's cache."""
        rolling = self.window + self.chunk - 1 if self.window and self.chunk else self.slots
        return [rolling, *[self.slots] * (self.layers - 1)]


class _Graph:
    """Nodes and initializers as they are added."""

    def __init__(self, seed: int) -> None:
        self.nodes: list[Any] = []
        self.initializers: list[Any] = []
        self._random = np.random.default_rng(seed)

    def add(self, operator: str, *inputs: str, output: str | None = None, **attributes: Any) -> str:
        output = output or f"{operator}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, list(inputs), [output], **attributes))
        return output

    def constant(self, value: Any, name: str | None = None) -> str:
        name = name or f"constant_{len(self.initializers)}"
        self.initializers.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def weight(self, *shape: int) -> str:
        scale = shape[0] ** -0.5
        return self.constant((self._random.standard_normal(shape) * scale).astype(np.float32))

    def norm(self, x: str, size: int) -> str:
        weight = self.constant((1 + 0.1 * self._random.standard_normal(size)).astype(np.float32))
        return self.add("RMSNormalization", x, weight, axis=-1, epsilon=1e-6)

    def heads(self, x: str, count: int, size: int) -> str:
        shaped = self.add("Reshape", x, self.constant(np.array([0, 0, count, size])))
        return self.add("Transpose", shaped, perm=[0, 2, 1, 3])

    def masked(self, *conditions: str) -> str:
        """A mask of what fulfils all conditions."""
        seen = conditions[0]
        for condition in conditions[1:]:
            seen = self.add("And", seen, condition)
        lowest = self.constant(np.finfo(np.float32).min)
        return self.add("Where", seen, self.constant(np.float32(0)), lowest)

    def window_mask(self, shape: Shape, positions: str) -> str:
        """The first layer's mask: of the positions that its slots hold, those in the window."""
        size = shape.layer_slots[0]
        held = self.constant(np.arange(size).reshape(1, 1, 1, -1))
        if shape.chunk:
            minus_one = self.constant(np.array([-1]))
            last = self.add("Gather", positions, minus_one, axis=2)
            behind = self.add("Add", last, self.constant(size - np.arange(size).reshape(1, 1, 1, -1)))
            held = self.add("Sub", last, self.add("Mod", behind, self.constant(np.int64(size))))
        begin = self.add("Sub", positions, self.constant(np.int64(shape.window or 0)))
        return self.masked(
            self.add("LessOrEqual", held, positions),
            self.add("Greater", held, begin),
            self.add("GreaterOrEqual", held, self.constant(np.int64(0))),
        )


def small_graph(shape: Shape) -> onnx.ModelProto:
    """The decoder: TensorScatter into the caches, Attention over all slots with a mask from positions."""
    graph = _Graph(shape.seed)
    width = shape.heads * shape.head_dim
    exponents = np.arange(0, shape.head_dim, 2) / shape.head_dim
    angles = np.arange(shape.slots)[:, None] * 10000.0**-exponents
    cos = graph.constant(np.cos(angles).astype(np.float32))
    sin = graph.constant(np.sin(angles).astype(np.float32))
    # The mask: [B, 1, T, S].
    slots = graph.constant(np.arange(shape.slots).reshape(1, 1, 1, -1))
    positions = graph.add("Unsqueeze", "position_ids", graph.constant(np.array([1, 3])))
    masks = [graph.masked(graph.add("LessOrEqual", slots, positions))] * shape.layers
    begins = [graph.add("Gather", "position_ids", graph.constant(np.int64(0)), axis=1)] * shape.layers
    if shape.window:
        masks[0] = graph.window_mask(shape, positions)
    if shape.chunk:
        begins[0] = graph.add("Mod", begins[0], graph.constant(np.int64(shape.layer_slots[0])))
    embedding = graph.constant(graph._random.standard_normal((shape.vocabulary, shape.hidden), np.float32))
    x = graph.add("Gather", embedding, "input_ids")
    for layer in range(shape.layers):
        h = graph.norm(x, shape.hidden)
        q = graph.heads(
            graph.add("MatMul", h, graph.weight(shape.hidden, width)), shape.heads, shape.head_dim
        )
        present = []
        for part in ("key", "value"):
            made = graph.add("MatMul", h, graph.weight(shape.hidden, shape.kv_heads * shape.head_dim))
            made = graph.heads(made, shape.kv_heads, shape.head_dim)
            if part == "key":
                made = graph.add("RotaryEmbedding", made, cos, sin, "position_ids")
            if shape.cache_dtype != "float32":
                made = graph.add("Cast", made, to=ONNX_TYPE[shape.cache_dtype])
            past, name = f"past_key_values.{layer}.{part}", f"present.{layer}.{part}"
            written = graph.add(
                "TensorScatter", past, made, begins[layer], output=name, axis=-2, mode="linear"
            )
            if shape.cache_dtype != "float32":
                written = graph.add("Cast", written, to=TensorProto.FLOAT)
            present.append(written)
        q = graph.add("RotaryEmbedding", q, cos, sin, "position_ids")
        attended = graph.add("Attention", q, *present, masks[layer])
        attended = graph.add("Transpose", attended, perm=[0, 2, 1, 3])
        attended = graph.add("Reshape", attended, graph.constant(np.array([0, 0, width])))
        x = graph.add("Add", x, graph.add("MatMul", attended, graph.weight(width, shape.hidden)))
        h = graph.norm(x, shape.hidden)
        gate = graph.add("MatMul", h, graph.weight(shape.hidden, shape.feed_forward))
        up = graph.add("MatMul", h, graph.weight(shape.hidden, shape.feed_forward))
        h = graph.add("Mul", graph.add("Gelu", gate, approximate="tanh"), up)
        x = graph.add("Add", x, graph.add("MatMul", h, graph.weight(shape.feed_forward, shape.hidden)))
    if shape.logits == "last":
        ends = [graph.constant(np.array([value])) for value in (-1, np.iinfo(np.int64).max, 1)]
        x = graph.add("Slice", x, *ends)
    head = graph.constant(3 * graph._random.standard_normal((shape.hidden, shape.vocabulary), np.float32))
    graph.add("MatMul", graph.norm(x, shape.hidden), head, output="logits")
    inputs, outputs = contract(shape)
    made = helper.make_graph(
        graph.nodes,
        "small",
        [helper.make_tensor_value_info(e["name"], ONNX_TYPE[e["dtype"]], e["shape"]) for e in inputs],
        [helper.make_tensor_value_info(e["name"], ONNX_TYPE[e["dtype"]], e["shape"]) for e in outputs],
        graph.initializers,
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 24)], ir_version=11)


def contract(shape: Shape) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Inputs and outputs as the manifest lists them."""
    caches = {
        f"{layer}.{part}": {
            "dtype": shape.cache_dtype,
            "shape": ["B", shape.kv_heads, slots, shape.head_dim],
        }
        for layer, slots in enumerate(shape.layer_slots)
        for part in ("key", "value")
    }
    rows = 1 if shape.logits == "last" else "T"
    inputs = [{"name": name, "dtype": "int64", "shape": ["B", "T"]} for name in ("input_ids", "position_ids")]
    inputs += [{"name": f"past_key_values.{name}", **cache} for name, cache in caches.items()]
    outputs: list[dict[str, Any]] = [
        {"name": "logits", "dtype": "float32", "shape": ["B", rows, shape.vocabulary]},
        *({"name": f"present.{name}", **cache} for name, cache in caches.items()),
    ]
    return inputs, outputs


def write_bundle(folder: Path, shape: Shape = Shape()) -> Path:
    """Writes the bundle and returns its folder."""
    folder.mkdir(parents=True)
    onnx.save(
        small_graph(shape),
        folder / "model.onnx",
        save_as_external_data=True,
        location="model.onnx.data",
        size_threshold=1024,
    )
    (folder / "tokenizer.model").write_bytes(TOKENIZER.read_bytes())
    write_manifest(folder, manifest(shape))
    return folder


def manifest(shape: Shape) -> dict[str, Any]:
    """The manifest without its files."""
    inputs, outputs = contract(shape)
    return {
        "format": "gemma-export-bundle",
        "format_version": 1,
        "created_by": "gemma-export 0.1.0",
        "model": {
            "name": "small",
            "size": "tiny",
            "family": "gemma",
            "vocab_size": shape.vocabulary,
            "hidden_size": shape.hidden,
            "num_layers": shape.layers,
            "num_query_heads": shape.heads,
            "num_kv_heads": shape.kv_heads,
            "head_dim": shape.head_dim,
            "intermediate_size": shape.feed_forward,
            "context_length": 8192,
            "rms_norm_eps": 1e-6,
            "rope_theta": 10000,
            "parameters": {"embedding": 0, "other": 0},
        },
        "precision": "fp32",
        "scheme": "fp32",
        "target": "cpu",
        "storage_dtype": "float32",
        "compute_dtype": "float32",
        "cache_dtype": shape.cache_dtype,
        "cache_scales": [],
        "quantization": None,
        "fp32_tensors": [],
        "graph": {
            "file": "model.onnx",
            "opset": 24,
            "max_length": shape.slots,
            "logits": shape.logits,
            "batch": "dynamic",
            "inputs": inputs,
            "outputs": outputs,
            "passes": {},
            **_rolling(shape),
        },
        "tokens": {"bos": 2, "eos": 1, "pad": 0, "stop": [1, 107]},
        "bytes": {"weights": 0, "per_token": 0, "cache_per_row": 0},
        "checkpoint": {"form": "random", "digest": "", "source": None},
        "parity": {"verdict": "not run", "level": "none", "allowed_failure": False},
        "tools": {},
    }


def _rolling(shape: Shape) -> dict[str, Any]:
    if not shape.chunk:
        return {}
    rolling = {"layers": [0], "window": shape.window, "chunk": shape.chunk, "slots": shape.layer_slots[0]}
    return {"rolling": {**rolling, "saved_per_row": 0}}


def write_manifest(folder: Path, contents: dict[str, Any]) -> None:
    """Writes `manifest.json` with the files as they are in the folder."""
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != "manifest.json":
            data = path.read_bytes()
            digest = hashlib.sha256(data).hexdigest()
            files[path.relative_to(folder).as_posix()] = {"size": len(data), "sha256": digest}
    (folder / "manifest.json").write_text(json.dumps({**contents, "files": files}), encoding="utf-8")


def bfloat16_to_float32(bits: np.ndarray) -> np.ndarray:
    """What 16 bits mean as bfloat16, by another library."""
    return bits.view(ml_dtypes.bfloat16).astype(np.float32)
