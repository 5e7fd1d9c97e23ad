"""Each channel of an activation is divided by a number, and what reads it takes the number back.

    RMSNormalization(x, gain) → MatMul(·, Wᵀ)   →  RMSNormalization(x, gain / s) → MatMul(·, (W · s)ᵀ)
    gelu(gate) · up → MatMul(·, Wᵀ)             →  gelu(gate) · (up / s)         → MatMul(·, (W · s)ᵀ)

Nothing is computed that was not computed before: s [K] goes into the gain, or into the rows of the up half
of gate and up, and into the columns of every weight that reads the channels, while these are written. A
channel that stands out no longer makes the scale with which all the others are rounded.

Keyed by what makes the activation: `layers.{i}.input_layernorm`, `layers.{i}.post_attention_layernorm`,
`layers.{i}.mlp.up_proj`.

Illegal, and an error, when:
  (1) nothing in the graph has the name, or s is not one positive number per channel;
  (2) what reads the activation is not a linear layer, or its weight has another reader, as the table has;
  (3) the up half is read by more than the product with the activated gate, or that by more than one weight.

Source: Xiao et al., SmoothQuant (arXiv 2211.10438), section 4.
"""

from collections.abc import Mapping

import onnx_ir as ir
import torch
from torch import Tensor

from gemma_export.errors import GraphError
from gemma_export.graphs.passes.merge_projections import Linear, find_linear
from gemma_export.graphs.passes.patterns import users
from gemma_export.graphs.tensors import RowSource, ScaleColumns, ScaleRows, StreamedTensor, streamed

_CALIBRATE = "The scales belong to another model, or are damaged: calibrate again."


def fold_channel_scales(model: ir.Model, smoothing: Mapping[str, Tensor]) -> int:
    """Folds every vector into the canonical graph's weights; returns how many.

    Args:
        model: The canonical graph, in fp32.
        smoothing: Vectors fp32 [K] by the name of what makes the activation.

    Raises:
        GraphError: A vector cannot be folded, for one of the reasons above.
    """
    linears = [linear for node in model.graph if (linear := find_linear(node)) is not None]
    by_weight = {str(linear.weight.name).removesuffix(".weight"): linear for linear in linears}
    for name, scales in smoothing.items():
        gain = model.graph.initializers.get(f"{name}.gain")
        if gain is not None:
            _fold_norm(name, gain, scales)
        elif name.endswith(".mlp.up_proj") and f"{name.removesuffix('up_proj')}gate_up_proj" in by_weight:
            _fold_up(name, by_weight[f"{name.removesuffix('up_proj')}gate_up_proj"], scales)
        else:
            raise GraphError(f"There is no {name} whose channels could be scaled.", _CALIBRATE)
    return len(smoothing)


def _fold_norm(name: str, gain: ir.Value, scales: Tensor) -> None:
    source = _source(gain)
    _check(name, scales, source.shape[0])
    norm = _only_reader(name, gain, "RMSNormalization")
    readers = _readers(name, norm.outputs[0])
    _replace(gain, ScaleRows(source, 1 / scales.float()))
    for reader in readers:
        _replace(reader.weight, ScaleColumns(_source(reader.weight), scales.float()))


def _fold_up(name: str, merged: Linear, scales: Tensor) -> None:
    source = _source(merged.weight)
    width = source.shape[0] // 2
    _check(name, scales, width)
    split = _only_reader(name, merged.output, "Split")
    gated = _only_reader(name, split.outputs[1], "Mul")
    readers = _readers(name, gated.outputs[0])
    if len(readers) != 1:
        raise _unreadable(name, f"{len(readers)} weights read it")
    _replace(merged.weight, ScaleRows(source, torch.cat((torch.ones(width), 1 / scales.float()))))
    _replace(readers[0].weight, ScaleColumns(_source(readers[0].weight), scales.float()))


def _check(name: str, scales: Tensor, channels: int) -> None:
    if scales.shape != (channels,):
        raise GraphError(f"{name} has {channels} channels, and {list(scales.shape)} scales.", _CALIBRATE)
    if not (scales.isfinite() & (scales > 0)).all():
        raise GraphError(f"The scales of {name} are not all positive numbers.", _CALIBRATE)


def _readers(name: str, activation: ir.Value) -> list[Linear]:
    """The linear layers that read an activation, which nothing else does."""
    linears = [(node, find_linear(node)) for node in users(activation)]
    for node, linear in linears:
        if linear is None or node.inputs[0] is not activation:
            raise _unreadable(name, f"a {node.op_type} reads it")
        if len(linear.weight.uses()) != 1:
            raise _unreadable(name, f"{linear.weight.name} is read elsewhere too")
    return [linear for _, linear in linears if linear is not None]


def _only_reader(name: str, value: ir.Value, op_type: str) -> ir.Node:
    readers = users(value)
    if len(readers) != 1 or readers[0].op_type != op_type:
        raise _unreadable(name, f"{', '.join(node.op_type for node in readers)} read {value.name}")
    return readers[0]


def _unreadable(name: str, reason: str) -> GraphError:
    return GraphError(
        f"The channels of {name} cannot be scaled: {reason}.",
        "This is a defect of a graph pass or of the calibration: please report it.",
    )


def _source(value: ir.Value) -> RowSource:
    tensor = streamed(value)
    assert tensor is not None
    return tensor.source


def _replace(value: ir.Value, source: RowSource) -> None:
    value.const_value = StreamedTensor(source, name=value.name)
