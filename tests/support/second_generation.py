"""A small graph with all that the second generation adds."""

from dataclasses import replace
from functools import cache

import onnx_ir as ir
from support.checkpoints import LITTLE_2
from support.graphs import random_weights

from gemma_export.exporter.trace import bind_weights, trace
from gemma_export.graphs import schedule
from gemma_export.graphs.tensors import InMemory

# Layers are local, global, global, local: two of a kind follow each other, and the last is as the first.
CONFIG = replace(LITTLE_2, num_layers=4, head_dim=16, layer_kinds=("local", "global", "global", "local"))
WINDOW, SLOTS = 8, 32


@cache
def _traced() -> ir.Model:
    return trace(CONFIG, SLOTS, all_logits=True)


def raw_graph(projections: float = 1.0) -> ir.Model:
    """The traced graph with its weights; those of queries and keys are multiplied by a number."""
    model = _traced().clone()
    values = [*model.graph.inputs, *model.graph.initializers.values()]
    for value in (*values, *(output for node in model.graph for output in node.outputs)):
        value.type = None if value.dtype is None else ir.TensorType(value.dtype)  # A clone shares them.
    weights = random_weights(CONFIG)
    for name in [name for name in weights if name.endswith(("q_proj.weight", "k_proj.weight"))]:
        weights[name] = InMemory(name, weights[name].tensor * projections)
    bind_weights(model, CONFIG, weights)
    return model


def canonical_graph(projections: float = 1.0) -> ir.Model:
    """The same, canonical."""
    model = raw_graph(projections)
    schedule.canonicalize(model)
    return model


def of_type(model: ir.Model, op_type: str) -> list[ir.Node]:
    return [node for node in model.graph if node.op_type == op_type]
