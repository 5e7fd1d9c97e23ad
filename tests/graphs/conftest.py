"""The traced graph of a small decoder: traced once, cloned for each test."""

import onnx_ir as ir
import pytest
from support.graphs import MakeGraph, cloned, random_weights, small_config

from gemma_export.exporter.trace import bind_weights, trace

SLOTS = 16


@pytest.fixture(scope="session")
def _traced() -> dict[int, ir.Model]:
    """RAW graphs by number of KV heads."""
    return {}


@pytest.fixture
def raw_graph(_traced: dict[int, ir.Model]) -> MakeGraph:
    """Makes a RAW graph of two layers with bound random weights; `num_kv_heads` chooses MQA, GQA or MHA."""

    def make(num_kv_heads: int = 1) -> ir.Model:
        config = small_config(num_kv_heads=num_kv_heads)
        if num_kv_heads not in _traced:
            _traced[num_kv_heads] = trace(config, SLOTS, all_logits=True)
        model = cloned(_traced[num_kv_heads])
        bind_weights(model, config, random_weights(config))
        return model

    return make
