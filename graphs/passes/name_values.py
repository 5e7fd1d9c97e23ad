"""Values get the names of what they are: the layer and the module whose output they carry.

An audit, a profile or a person reading the graph then finds `layers.3.mlp.down_proj`, the name that the
checkpoint and the reference use, where the tracer had left `mul_308`.
"""

import re

import onnx_ir as ir

from gemma_export.graphs.passes.merge_projections import Linear, find_linear

_LAYER = re.compile(r"layers\.(\d+)\.")


def name_values(model: ir.Model) -> int:
    """Renames what is recognised; returns how many values."""
    outputs = set(model.graph.outputs)
    names: dict[ir.Value, str] = {}
    layer = ""
    for node in model.graph:
        name = _name(node, layer)
        if name is None:
            continue
        if (match := _LAYER.match(name)) is not None:
            layer = match.group(0)
        if node.outputs[0] not in outputs and name not in names.values():
            names[node.outputs[0]] = name
    for value, name in names.items():
        value.name = name
        producer = value.producer()
        assert producer is not None
        producer.name = name
    return len(names)


def _name(node: ir.Node, layer: str) -> str | None:
    if node.op_type == "RMSNormalization":
        gain = node.inputs[1]
        return None if gain is None else str(gain.name).removesuffix(".gain")
    if (linear := find_linear(node)) is not None:
        return "lm_head" if not layer or not _LAYER.match(str(linear.weight.name)) else _stem(linear.weight)
    if node.op_type == "Gather" and node.inputs[0] is not None and node.inputs[0].is_initializer():
        return _stem(node.inputs[0])
    if not layer:
        return None
    source = node.inputs[1] if len(node.inputs) > 1 else None
    match node.op_type:
        case "Attention":
            return f"{layer}self_attn.attention"
        case "Gelu":
            return f"{layer}mlp.activation"
        case "Mul" if _produced_by(node.inputs[0], "Gelu"):
            return f"{layer}mlp.gated"
        case "Add" if (linear := _linear_behind(source)) is not None:
            after_attention = str(linear.weight.name).endswith("o_proj.weight")
            return f"{layer}{'attention' if after_attention else 'mlp'}_residual"
    return None


def _linear_behind(value: ir.Value | None) -> Linear | None:
    """The linear layer that gives a value, with or without a norm behind it."""
    producer = None if value is None else value.producer()
    if producer is None or producer.op_type != "RMSNormalization":
        return find_linear(producer)
    return _linear_behind(producer.inputs[0])


def _stem(weight: ir.Value) -> str:
    return str(weight.name).removesuffix(".weight")


def _produced_by(value: ir.Value | None, op_type: str) -> bool:
    producer = None if value is None else value.producer()
    return producer is not None and producer.op_type == op_type
