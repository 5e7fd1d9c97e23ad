"""The small graph, and one product, with codes in standard operators."""

import onnx_ir as ir
import pytest
import torch
from support.graphs import MakeGraph, canonical, from_text

from gemma_export.graphs import schedule
from gemma_export.graphs.formats import WeightFormat
from gemma_export.graphs.passes.quantize_dequantize import quantize_dequantize
from gemma_export.graphs.quantization import LinearQuantization, Quantization

LAYERS = 2
LINEARS = [
    f"layers.{i}.{name}"
    for i in range(LAYERS)
    for name in ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
]
ROWS = WeightFormat(8)
TABLE = LinearQuantization("w8", ROWS)
HOW: dict[str, LinearQuantization] = {
    "w8": TABLE,
    # Codes of 8 bits over ±3.2: nearly all of these activations, and some that saturate.
    "w8a8-tensor": LinearQuantization("w8a8-tensor", ROWS, activation_scale=0.025),
    "w4": LinearQuantization("w4", WeightFormat(4, 16), "mse"),
}
each_form = pytest.mark.parametrize("form", HOW)


def for_all(how: LinearQuantization, **others: LinearQuantization | None) -> Quantization:
    """A quantization of the small decoder; `others` by the last part of a name, None for not named."""
    linears = {name: others.get(name.rsplit(".", 1)[1], how) for name in LINEARS}
    linears["embed_tokens"] = others.get("embed_tokens", TABLE)
    return Quantization({}, {name: how for name, how in linears.items() if how is not None})


def quantized(raw_graph: MakeGraph, quantization: Quantization) -> ir.Model:
    model = canonical(raw_graph)
    assert quantize_dequantize(model, quantization) == LAYERS * 4 + 1
    schedule.remove_dead_code(model)
    return model


def nodes(model: ir.Model, op_type: str) -> list[ir.Node]:
    return [node for node in model.graph if node.op_type == op_type]


def product_of(weight: torch.Tensor, how: LinearQuantization) -> ir.Model:
    """x · Wᵀ of three rows x, quantized."""
    rows, columns = weight.shape
    text = f"""one (float[3, {columns}] x, float[{rows}, {columns}] layer) => (float[3, {rows}] y)
        <float[{columns}, {rows}] turned>
        {{ turned = Transpose<perm = [1, 0]>(layer)
           y = MatMul(x, turned) }}"""
    model = from_text(text, layer=weight.numpy())
    assert quantize_dequantize(model, Quantization({}, {"layer": how})) == 1
    schedule.remove_dead_code(model)
    return model
