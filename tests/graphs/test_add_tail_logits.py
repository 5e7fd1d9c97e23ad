"""The logits of the last tokens, on request: those of the graph that gives all of them."""

import onnx_ir as ir
import pytest
import torch
from support.graphs import decoder_feeds, random_weights, run, small_config

from gemma_export.errors import GraphError
from gemma_export.exporter.trace import bind_weights, trace
from gemma_export.graphs import schedule
from gemma_export.graphs.passes.add_tail_logits import add_tail_logits

TOKENS = 5
# Products of some rows and of all: sums in another order, on logits around 1.
TOLERANCE = 5e-6


def lowered(softcap: float | None, *, all_logits: bool) -> ir.Model:
    config = small_config(final_softcap=softcap)
    model = trace(config, max_length=16, all_logits=all_logits)
    bind_weights(model, config, random_weights(config))
    schedule.canonicalize(model)
    schedule.lower(model, "cpu", torch.float32, torch.float32)
    return model


@pytest.mark.parametrize("softcap", [None, 2.0], ids=["plain", "capped"])
def test_the_tail_is_the_end_of_all_logits(softcap: float | None) -> None:
    every, model = (lowered(softcap, all_logits=value) for value in (True, False))
    feeds = decoder_feeds(every, batch=2, tokens=TOKENS, start=0)
    expected = run(every, feeds)["logits"]
    assert len({row.tobytes() for row in expected.reshape(-1, expected.shape[-1])}) == 2 * TOKENS
    assert add_tail_logits(model) == 1
    for tail in (1, 2, TOKENS):
        found = run(model, {**feeds, "tail_start": torch.tensor([-tail]).numpy()})
        assert found["tail_logits"].shape == (2, tail, expected.shape[2])
        assert abs(found["tail_logits"] - expected[:, -tail:]).max() < TOLERANCE
        assert (found["logits"] == found["tail_logits"][:, -1:]).all()


def test_who_does_not_ask_gets_the_last_token() -> None:
    model = lowered(None, all_logits=False)
    feeds = decoder_feeds(model, batch=1, tokens=TOKENS, start=0)
    before = run(model, feeds)["logits"]
    outputs = [value.name for value in model.graph.outputs]
    products = [node.op_type for node in model.graph].count("FusedMatMul")
    add_tail_logits(model)
    found = run(model, feeds)
    assert (found["logits"] == before).all()
    assert (found["tail_logits"] == before).all()
    # What the contract names stands where it stood, and the head is still one product.
    assert [value.name for value in model.graph.outputs] == [*outputs, "tail_logits"]
    assert [node.op_type for node in model.graph].count("FusedMatMul") == products


def test_a_graph_that_gives_all_logits_is_refused() -> None:
    model = lowered(None, all_logits=True)
    with pytest.raises(GraphError, match="other logits than the last token's"):
        add_tail_logits(model)
