"""Showing only some of a layer's activations."""

import pytest
import torch

from gemma_export.exporter import decoder
from gemma_export.exporter.checkpoints.checkpoint import RandomCheckpoint
from gemma_export.exporter.config import GemmaConfig
from gemma_export.exporter.parity import observation
from gemma_export.exporter.parity.reference import Reference

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = GemmaConfig(
    name="random",
    vocab_size=300,
    hidden_size=48,
    num_layers=2,
    num_query_heads=4,
    num_kv_heads=2,
    head_dim=16,
    intermediate_size=80,
    context_length=64,
)


def observed(wanted: frozenset[str] | None) -> dict[str, torch.Tensor]:
    weights = {name.removeprefix("model."): tensor for name, tensor in RandomCheckpoint(CONFIG, 3).items()}
    seen: dict[str, torch.Tensor] = {}
    Reference(CONFIG, weights).run(
        [[2, 5, 9, 200, 31]],
        observe=lambda name, x: seen.update({name: torch.from_numpy(x.copy())}),
        wanted=wanted,
    )
    return seen


@pytest.mark.parametrize(
    "wanted",
    [
        {"self_attn.scores"},
        {"self_attn.query", "self_attn.key"},
        {"input_layernorm", "mlp.product", "self_attn.attended"},
        set(),
    ],
    ids=["scores", "query and key", "inputs", "none"],
)
def test_shows_what_is_wanted_as_it_is_among_all(wanted):
    everything = observed(None)
    some = observed(frozenset(wanted))
    assert set(some) == {f"layers.{i}.{name}" for i in range(2) for name in wanted} | {"embedding", "norm"}
    for name, values in some.items():
        assert torch.equal(values, everything[name])


def test_computes_nothing_that_is_not_wanted(monkeypatch):
    rotated = []

    def counted(*arguments: torch.Tensor) -> torch.Tensor:
        rotated.append(arguments)
        return decoder.rotate(*arguments)

    monkeypatch.setattr(observation, "rotate", counted)
    observed(frozenset({"self_attn.key", "mlp.product"}))
    assert not rotated
    observed(frozenset({"self_attn.scores"}))
    assert len(rotated) == CONFIG.num_layers
