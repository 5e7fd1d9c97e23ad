"""Divergence summed up over blocks of the vocabulary: as over whole rows, and exact when it is tiny."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_export.exporter.quantize.divergence import Divergence
from gemma_export.runtime.parity import ParityAccumulator

pytestmark = pytest.mark.usefixtures("one_thread")


def logits(seed: int, positions: int = 6, vocabulary: int = 50, size: float = 4.0) -> torch.Tensor:
    return size * torch.randn(positions, vocabulary, generator=torch.Generator().manual_seed(seed))


def divergence(
    reference: torch.Tensor, variants: list[torch.Tensor], targets: torch.Tensor, block: int
) -> Divergence:
    found = Divergence(len(variants), targets)
    for start in range(0, reference.shape[1], block):
        part = slice(start, start + block)
        found.add(start, reference[:, part], [variant[:, part].clone() for variant in variants])
    return found


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 50), st.sampled_from([1e-3, 0.1, 3.0]))
def test_it_is_what_the_parity_gate_measures(seed, block, error):
    reference = logits(seed)
    variants = [reference + error * logits(seed + i, size=1.0) for i in (1, 2)]
    targets = torch.randint(50, (6,), generator=torch.Generator().manual_seed(seed))
    found = divergence(reference, variants, targets, block)
    for i, variant in enumerate(variants):
        gate = ParityAccumulator()
        gate.add(reference.numpy(), variant.numpy(), targets.numpy(), np.arange(6))
        figures = gate.figures()
        # fp32 sums against fp64 ones: 1e-7 of the terms, which are as large as the error.
        assert found.kl()[i].mean().item() == pytest.approx(figures.mean_kl, rel=1e-5, abs=1e-6 * error)
        change = np.log(figures.bundle_perplexity / figures.reference_perplexity)
        assert found.loss_changes()[i].mean().item() == pytest.approx(change, rel=1e-5, abs=1e-6)
        assert found.agreements()[i].double().mean().item() == figures.top1_agreement
    perplexity = found.reference_losses().mean().exp().item()
    assert perplexity == pytest.approx(figures.reference_perplexity, rel=1e-5)


def test_a_tiny_divergence_is_not_lost_in_rounding():
    reference = logits(0, positions=4, vocabulary=20_000)
    # Logits as large as 30 have steps of 2e-6 in fp32; an error of 1e-4 has a KL of 5e-9.
    variant = reference + 1e-4 * logits(1, positions=4, vocabulary=20_000, size=1.0)
    a, b = reference.double(), variant.double()
    p = a.softmax(-1)
    expected = (p * (a.log_softmax(-1) - b.log_softmax(-1))).sum(-1)
    assert expected.max() < 1e-8
    found = divergence(reference, [variant], torch.zeros(4, dtype=torch.int64), 3000)
    torch.testing.assert_close(found.kl()[0], expected, rtol=1e-2, atol=0)


def test_what_is_the_same_has_none():
    reference = logits(3)
    found = divergence(reference, [reference.clone(), reference + 2.0], torch.zeros(6, dtype=torch.int64), 7)
    assert not found.kl()[0].any()
    assert not found.loss_changes()[0].any()
    # A constant added to every logit changes no probability.
    torch.testing.assert_close(found.kl()[1], torch.zeros(6, dtype=torch.float64), rtol=0, atol=1e-6)
    assert found.agreements().all()


def test_a_broken_variant_costs_much_and_is_a_number():
    reference = logits(4)
    found = divergence(reference, [-1e4 * reference], torch.zeros(6, dtype=torch.int64), 10)
    assert torch.isfinite(found.kl()).all()
    assert (found.kl() > 10).all()
