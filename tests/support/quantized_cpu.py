"""Ways to quantize the small graph for a CPU, and what its tests look at."""

from collections import Counter

import onnx_ir as ir
import pytest
import torch
from support.quantized_tiny import every_layer

from gemma_export.graphs.formats import WeightFormat
from gemma_export.graphs.quantization import LinearQuantization, Quantization
from gemma_export.graphs.tensors import streamed

FP32, FP16 = torch.float32, torch.float16
LAYERS = 2
"""Of the small graph; blocks of 16 divide all of its rows."""

TOKEN = LinearQuantization("w8a8-token", WeightFormat(8))
W8 = LinearQuantization("w8", WeightFormat(8, 16))
W4 = LinearQuantization("w4", WeightFormat(4, 16, negative_scales=True), "mse")
FLOAT = LinearQuantization("float")
forms = pytest.mark.parametrize("how", [TOKEN, W8, W4], ids=lambda how: how.form)


def small(
    how: LinearQuantization, table: LinearQuantization = W8, **others: LinearQuantization
) -> Quantization:
    return every_layer(how, table, layers=LAYERS, **others)


def operators(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)


def numbers_of(model: ir.Model, name: str) -> torch.Tensor:
    tensor = streamed(model.graph.initializers[f"{name}.weight"])
    assert tensor is not None
    return tensor.source.read(0, tensor.source.shape[0])
