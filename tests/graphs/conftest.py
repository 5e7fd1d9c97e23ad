"""The traced graph of a small decoder: traced once, cloned for each test."""

from collections.abc import Callable, Iterator

import onnx_ir as ir
import pytest
from support.graphs import random_weights, small_config

from gemma_export.exporter.trace import bind_weights, trace

SLOTS = 16


def _values(model: ir.Model) -> Iterator[ir.Value]:
    yield from model.graph.inputs
    yield from model.graph.initializers.values()
    for node in model.graph:
        yield from node.outputs


@pytest.fixture(scope="session")
def _traced() -> dict[int, ir.Model]:
    """RAW graphs by number of KV heads."""
    return {}


@pytest.fixture
def raw_graph(_traced: dict[int, ir.Model]) -> Callable[..., ir.Model]:
    """Makes a RAW graph of two layers with bound random weights; `num_kv_heads` chooses MQA, GQA or MHA."""

    def make(num_kv_heads: int = 1) -> ir.Model:
        config = small_config(num_kv_heads=num_kv_heads)
        if num_kv_heads not in _traced:
            _traced[num_kv_heads] = trace(config, SLOTS, all_logits=True)
        model = _traced[num_kv_heads].clone()
        for value in _values(model):  # A clone shares its types' objects, and tests change types.
            value.type = None if value.dtype is None else ir.TensorType(value.dtype)
        bind_weights(model, config, random_weights(config))
        return model

    return make
