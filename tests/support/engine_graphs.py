"""Graphs to compile, with few slots and few layers: of the model that ships, or of Gemma 2."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import onnx_ir as ir
import torch
from support.graphs import random_weights
from support.quantized_tiny import LINEARS, tiny_source

from gemma_export.exporter.config import GemmaConfig
from gemma_export.exporter.engines.build import build_engines
from gemma_export.exporter.engines.request import EngineRequest
from gemma_export.exporter.events import Listener, ignore
from gemma_export.exporter.trace import bind_weights, trace
from gemma_export.graphs import schedule
from gemma_export.graphs.formats import WeightFormat
from gemma_export.graphs.quantization import LinearQuantization, Quantization
from gemma_export.graphs.storage import GRAPH_FILE, write_model
from gemma_export.graphs.tensors import RowSource
from gemma_export.runtime.manifest import EngineInfo

SLOTS = 64
WEIGHT_ONLY = LinearQuantization("w8", WeightFormat(8))
STATIC = LinearQuantization("w8a8-tensor", WeightFormat(8), activation_scale=0.0625)
BLOCKS = LinearQuantization("w4", WeightFormat(4, 128))
FORMS: Mapping[str, LinearQuantization | None] = {
    "fp32": None,
    "fp16": None,
    "bf16": None,
    "w8a16": WEIGHT_ONLY,
    "w8a8": STATIC,
    "w4a16": BLOCKS,
}
"""How each scheme has its linear layers; the table of a quantized one is always 8 bits."""
COMPUTE = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Written:
    """A graph on disk: its file, its decoder layers and the bytes of its weights."""

    file: Path
    layers: int
    weights: int

    def build(
        self, folder: Path, *sms: int, max_batch: int = 1, listener: Listener = ignore
    ) -> tuple[EngineInfo, ...]:
        """Engines for TensorRT for RTX, with the whole cache as the prefill chunk."""
        request = EngineRequest("rtx", sms, max_batch, SLOTS)
        return build_engines(self.file, self.layers, self.weights, request, folder, listener)

    def changed(self, name: str, change: Callable[[ir.Graph], None]) -> "Written":
        """The same with another graph beside the same weights."""
        model = ir.load(self.file)
        change(model.graph)
        file = self.file.with_name(f"{name}.onnx")
        ir.save(model, file)
        return replace(self, file=file, weights=weight_bytes(model))


def second_generation(layers: int) -> GemmaConfig:
    """Gemma 2 in small: grouped queries, local layers and global ones, norms around everything, both caps."""
    return GemmaConfig(
        name="gemma2-small",
        family="gemma2",
        vocab_size=512,
        hidden_size=256,
        num_layers=layers,
        num_query_heads=4,
        num_kv_heads=2,
        head_dim=64,
        intermediate_size=512,
        context_length=SLOTS,
        layer_kinds=tuple("global" if i % 2 else "local" for i in range(layers)),
        sliding_window=16,
        attention_softcap=50.0,
        final_softcap=30.0,
        query_pre_attn_scalar=64,
        post_norms=True,
    )


def write_engine_graph(
    folder: Path,
    scheme: str,
    layers: int = 2,
    lower: Callable[[ir.Model], None] | None = None,
    sms: tuple[int, ...] = (),
    *,
    capped: bool = False,
) -> Written:
    """Writes a graph.

    Args:
        folder: Where to; is made.
        scheme: A key of `FORMS`.
        layers: The first so many of the model's five.
        lower: Turns the canonical graph into another than TensorRT's.
        sms: Compute capabilities that it is spelled for.
        capped: Gemma 2 with random weights, instead of the model that ships.
    """
    if capped:
        config = second_generation(layers)
        weights: Mapping[str, RowSource] = random_weights(config)
    else:
        source = tiny_source()
        config, weights = replace(source.config, num_layers=layers), source.weights
    model = _traced(config).clone()
    values = (*model.graph.inputs, *model.graph.initializers.values())
    for value in (*values, *(output for node in model.graph for output in node.outputs)):
        value.type = None if value.dtype is None else ir.TensorType(value.dtype)  # A clone shares them.
    bind_weights(model, config, weights)
    schedule.canonicalize(model)
    if lower is not None:
        lower(model)
    else:
        compute = COMPUTE.get(scheme, torch.float16)
        schedule.lower(model, "rtx", compute, compute, (), _quantization(scheme, layers), sms)
    folder.mkdir(parents=True, exist_ok=True)
    write_model(model, folder)
    return Written(folder / GRAPH_FILE, layers, weight_bytes(model))


def weight_bytes(model: ir.Model) -> int:
    tensors = (value.const_value for value in model.graph.initializers.values())
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


@cache
def _traced(config: GemmaConfig) -> ir.Model:
    return trace(config, SLOTS)


def _quantization(scheme: str, layers: int) -> Quantization | None:
    form = FORMS[scheme]
    if form is None:
        return None
    linears = {"embed_tokens": WEIGHT_ONLY}
    linears |= {f"layers.{i}.{name}": form for i in range(layers) for name in LINEARS}
    return Quantization({}, linears)
