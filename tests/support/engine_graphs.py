"""Graphs to compile: the model that ships, lowered for TensorRT, with few slots and few layers."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import onnx_ir as ir
import torch
from support.quantized_tiny import LINEARS, tiny_source

from gemma_export.exporter.engines.build import build_engines
from gemma_export.exporter.engines.request import EngineRequest
from gemma_export.exporter.events import Listener, ignore
from gemma_export.exporter.trace import bind_weights, trace
from gemma_export.graphs import schedule
from gemma_export.graphs.formats import WeightFormat
from gemma_export.graphs.quantization import LinearQuantization, Quantization
from gemma_export.graphs.storage import GRAPH_FILE, write_model
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


def write_engine_graph(
    folder: Path,
    scheme: str,
    layers: int = 2,
    lower: Callable[[ir.Model], None] | None = None,
    sms: tuple[int, ...] = (),
) -> Written:
    """Writes a graph.

    Args:
        folder: Where to; is made.
        scheme: A key of `FORMS`.
        layers: The first so many of the model's five.
        lower: Turns the canonical graph into another than TensorRT's.
        sms: Compute capabilities that it is spelled for.
    """
    source = tiny_source()
    model = _traced(layers).clone()
    values = (*model.graph.inputs, *model.graph.initializers.values())
    for value in (*values, *(output for node in model.graph for output in node.outputs)):
        value.type = None if value.dtype is None else ir.TensorType(value.dtype)  # A clone shares them.
    bind_weights(model, replace(source.config, num_layers=layers), source.weights)
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
def _traced(layers: int) -> ir.Model:
    return trace(replace(tiny_source().config, num_layers=layers), SLOTS)


def _quantization(scheme: str, layers: int) -> Quantization | None:
    form = FORMS[scheme]
    if form is None:
        return None
    linears = {"embed_tokens": WEIGHT_ONLY}
    linears |= {f"layers.{i}.{name}": form for i in range(layers) for name in LINEARS}
    return Quantization({}, linears)
