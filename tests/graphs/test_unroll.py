"""One traced layer, repeated: the graph is the one that tracing every layer gives."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest
import torch
from support.graphs import decoder_feeds, random_weights, run, small_config

from gemma_export.errors import GraphError
from gemma_export.exporter.decoder import Decoder, rotary_tables
from gemma_export.exporter.trace import bind_weights, trace
from gemma_export.graphs.unroll import unroll


@pytest.mark.parametrize("num_layers", [1, 3], ids=["one layer", "three layers"])
def test_repeated_layers_have_their_own_weights_and_caches(num_layers: int) -> None:
    config = replace(small_config(), num_layers=num_layers)
    weights = random_weights(config)
    model = trace(config, 8, all_logits=False)
    bind_weights(model, config, weights)
    decoder = Decoder(config, 8).eval()
    for name, parameter in decoder.named_parameters():
        parameter.data = weights[name].tensor
    decoder.rotary_cos, decoder.rotary_sin = rotary_tables(config, 8)
    feeds = decoder_feeds(model, batch=2, tokens=3, start=4)
    caches = [torch.from_numpy(feeds[str(value.name)].copy()) for value in model.graph.inputs[2:]]
    with torch.no_grad():
        logits, presents = decoder(
            torch.from_numpy(feeds["input_ids"]), torch.from_numpy(feeds["position_ids"]), caches
        )

    results = list(run(model, feeds).values())

    assert len(results) == 1 + 2 * num_layers
    assert results[0].shape == (2, 1, config.vocab_size)
    for result, expected in zip(results, [logits, *presents], strict=True):
        # Only the order of sums differs: some 50 roundings of 2^-24 on values around 1.
        np.testing.assert_allclose(
            result, expected, rtol=0, atol=5e-6 * max(1.0, float(expected.abs().max()))
        )


def test_a_layer_shares_what_does_not_depend_on_it(raw_graph: Callable[..., ir.Model]) -> None:
    model = raw_graph()
    assert [node.op_type for node in model.graph].count("Where") == 1  # the mask
    assert [node.op_type for node in model.graph].count("GatherND") == 2  # cosines and sines


def test_a_graph_without_marks_is_refused(raw_graph: Callable[..., ir.Model]) -> None:
    with pytest.raises(GraphError, match="does not mark its layer"):
        unroll(raw_graph(), [0, 0])


def test_tracing_allocates_no_weight() -> None:
    """A released size is traced; its parameters alone would take 10 GB."""
    config = small_config(
        vocab_size=256_000,
        hidden_size=2048,
        num_layers=18,
        num_query_heads=8,
        head_dim=256,
        intermediate_size=16384,
    )
    model = trace(config, 64)
    assert all(
        value.const_value is None or value.const_value.nbytes < 1024
        for value in model.graph.initializers.values()
    )
    assert sum(name.startswith("layers.") for name in model.graph.initializers) == 18 * 9
