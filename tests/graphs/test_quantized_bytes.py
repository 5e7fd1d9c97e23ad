"""What a quantized 2B model takes on the disk, from the graph that would be written: no weight is read."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import onnx_ir as ir
import pytest
import torch
from torch import Tensor

from gemma_export.exporter.config import GemmaConfig, preset
from gemma_export.exporter.quantize.emulate import merged_shapes, stored_bytes
from gemma_export.exporter.trace import bind_weights, trace
from gemma_export.graphs import schedule
from gemma_export.graphs.formats import TABLE, WeightFormat
from gemma_export.graphs.quantization import LinearQuantization, Quantization
from gemma_export.graphs.storage import ALIGNMENT, external_bytes

CONFIG = preset("2b")
TOKEN = LinearQuantization("w8a8-token", WeightFormat(8))
BLOCKS = LinearQuantization("w8", WeightFormat(8, 256, negative_scales=True))
NIBBLES = LinearQuantization("w4", WeightFormat(4, 128, negative_scales=True), "mse")

INT8 = {TABLE: BLOCKS, "self_attn.qkv_proj": TOKEN, "self_attn.o_proj": TOKEN, "mlp.gate_up_proj": TOKEN}
CASES = {
    "int8": (INT8 | {"mlp.down_proj": TOKEN}, 1.004),
    # What a calibration makes of inputs with a few large numbers.
    "int8, down_proj in blocks": (INT8 | {"mlp.down_proj": BLOCKS}, 1.005),
    "int4": ({TABLE: BLOCKS}, 0.62),
}
"""Ways by kind of layer, int4 where none is named; and the most bytes per parameter of all weights."""


@dataclass(frozen=True)
class Unread:
    """A weight that has a shape and nothing else."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.bfloat16

    def read(self, start: int, stop: int) -> Tensor:
        raise AssertionError(f"{self.name} is read")


def linears(config: GemmaConfig, ways: Mapping[str, LinearQuantization]) -> dict[str, LinearQuantization]:
    kinds = {name: name.split(".", 2)[-1] if name != TABLE else TABLE for name in merged_shapes(config)}
    return {name: ways.get(kind, NIBBLES) for name, kind in kinds.items()}


@pytest.fixture(scope="module")
def one_layer() -> ir.Model:
    """The traced graph of the first layer alone, with the table and the head."""
    return trace(replace(CONFIG, num_layers=1), 8192)


def lowered(traced: ir.Model, ways: Mapping[str, LinearQuantization]) -> ir.Model:
    config = replace(CONFIG, num_layers=1)
    model = traced.clone()
    values = (*model.graph.inputs, *model.graph.initializers.values())
    for value in (*values, *(output for node in model.graph for output in node.outputs)):
        value.type = None if value.dtype is None else ir.TensorType(value.dtype)  # A clone shares them.
    bind_weights(model, config, {name: Unread(name, shape) for name, shape in config.weight_shapes.items()})
    schedule.canonicalize(model)
    quantization = Quantization({}, linears(config, ways))
    schedule.lower(model, "cpu", torch.float16, torch.float32, quantization=quantization)
    return model


@pytest.mark.parametrize("case", CASES)
def test_the_bytes_of_2b(case: str, one_layer: ir.Model) -> None:
    ways, most = CASES[case]
    model = lowered(one_layer, ways)
    values = [value for name, value in model.graph.initializers.items() if name.startswith("layers.0.")]
    sizes = [value.const_value.nbytes for value in values if value.const_value is not None]
    layer = sum(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes)
    found = external_bytes(model) + (CONFIG.num_layers - 1) * layer
    assert found / (CONFIG.embedding_parameters + CONFIG.other_parameters) < most
    chosen = linears(CONFIG, ways)
    weights = sum(stored_bytes(chosen[name], *shape) for name, shape in merged_shapes(CONFIG).items())
    norms = 4 * CONFIG.hidden_size * (2 * CONFIG.num_layers + 1)
    padding = ALIGNMENT * len(sizes) * CONFIG.num_layers
    assert abs(found - weights - norms) <= padding
