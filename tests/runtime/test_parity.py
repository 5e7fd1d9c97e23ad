import json
import math
from dataclasses import replace

import numpy as np
import pytest

from gemma_export.errors import UsageError
from gemma_export.runtime.parity import BUDGETS, Budget, ParityAccumulator, ParityFigures, verdict

RANDOM = np.random.default_rng(0)
REFERENCE = (RANDOM.standard_normal((50, 40)) * 3).astype(np.float32)
BUNDLE = (REFERENCE + RANDOM.standard_normal((50, 40)) * 0.1).astype(np.float32)
TARGETS = RANDOM.integers(0, 40, 50)
POSITIONS = np.arange(50) % 20


def measure(reference: np.ndarray, bundle: np.ndarray, block: int = 50) -> ParityFigures:
    accumulator = ParityAccumulator()
    for start in range(0, len(reference), block):
        rows = slice(start, start + block)
        accumulator.add(reference[rows], bundle[rows], TARGETS[rows], POSITIONS[rows])
    return accumulator.figures()


def probabilities(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits.astype(np.float64))
    return weights / weights.sum(axis=1, keepdims=True)


def test_figures_are_their_definitions() -> None:
    figures = measure(REFERENCE, BUNDLE)
    p, q = probabilities(REFERENCE), probabilities(BUNDLE)
    kl = (p * np.log(p / q)).sum(axis=1)
    error = np.abs(REFERENCE.astype(np.float64) - BUNDLE)
    assert figures.tokens == 50
    assert figures.max_absolute_error == pytest.approx(error.max())
    assert figures.mean_absolute_error == pytest.approx(error.mean())
    assert figures.max_relative_error == pytest.approx(error.max() / np.abs(REFERENCE).max())
    assert figures.mean_kl == pytest.approx(kl.mean())
    assert figures.max_kl == pytest.approx(kl.max())
    same = REFERENCE.argmax(axis=1) == BUNDLE.argmax(axis=1)
    assert figures.top1_agreement == same.mean()
    rows = np.arange(50)
    assert figures.reference_perplexity == pytest.approx(math.exp(-np.log(p[rows, TARGETS]).mean()))
    assert figures.bundle_perplexity == pytest.approx(math.exp(-np.log(q[rows, TARGETS]).mean()))
    assert figures.positions == tuple(range(20))
    assert figures.kl_by_position[3] == pytest.approx(kl[POSITIONS == 3].mean())
    assert figures.error_by_position[19] == pytest.approx(error[POSITIONS == 19].mean())
    assert figures.agreement_by_position[0] == same[POSITIONS == 0].mean()


@pytest.mark.parametrize("block", [1, 7, 16, 17])
def test_blocks_add_up(block: int) -> None:
    whole, parts = measure(REFERENCE, BUNDLE).to_json(), measure(REFERENCE, BUNDLE, block).to_json()
    for name, value in whole.items():
        assert parts[name] == pytest.approx(value), name


def test_equal_logits_have_no_error() -> None:
    figures = measure(REFERENCE, REFERENCE)
    assert figures.max_absolute_error == figures.mean_kl == figures.max_kl == 0
    assert figures.perplexity_change == 0
    assert all(verdict(figures, budget) == () for budget in BUDGETS.values())


def test_kl_is_of_distributions_not_of_logits() -> None:
    """A constant added to all logits changes no probability."""
    figures = measure(REFERENCE, REFERENCE + np.float32(8))
    assert figures.max_kl < 1e-12
    assert figures.max_absolute_error == pytest.approx(8, rel=1e-6)


def test_kl_is_from_the_reference() -> None:
    a = np.log(np.array([[0.9, 0.1]], np.float32))
    b = np.log(np.array([[0.5, 0.5]], np.float32))
    accumulator = ParityAccumulator()
    accumulator.add(a, b, None, [0])
    assert accumulator.figures().mean_kl == pytest.approx(0.9 * math.log(1.8) + 0.1 * math.log(0.2), rel=1e-5)


def test_small_divergences_are_seen() -> None:
    """fp32's budget is 1e-6: that must not drown in the rounding of the sums."""
    noise = RANDOM.standard_normal(REFERENCE.shape)
    small = [
        measure(REFERENCE, (REFERENCE + scale * noise).astype(np.float32)).mean_kl for scale in (1e-3, 1e-4)
    ]
    assert 50 < small[0] / small[1] < 200
    assert small[0] < 1e-5


def test_targets_may_be_unknown() -> None:
    accumulator = ParityAccumulator()
    accumulator.add(REFERENCE, BUNDLE, None, POSITIONS)
    figures = accumulator.figures()
    assert figures.reference_perplexity is figures.bundle_perplexity is figures.perplexity_change is None
    accumulator.add(REFERENCE[:2], BUNDLE[:2], [-1, 5], [0, 1])
    expected = 1 / probabilities(REFERENCE)[1, 5]
    assert accumulator.figures().reference_perplexity == pytest.approx(expected)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("whose", ["reference", "bundle"])
@pytest.mark.parametrize("precision", BUDGETS)
def test_what_is_not_finite_never_passes(value: float, whose: str, precision: str) -> None:
    logits = {"reference": REFERENCE.copy(), "bundle": REFERENCE.copy()}
    logits[whose][7, 3] = value
    figures = measure(logits["reference"], logits["bundle"])
    assert verdict(figures, BUDGETS[precision]) == (
        f"the {whose} gives NaN or infinite logits at 1 of 50 tokens",
    )
    # The other tokens still tell something.
    assert figures.mean_kl == 0


def test_only_nan_never_passes() -> None:
    figures = measure(REFERENCE, np.full_like(REFERENCE, np.nan))
    assert figures.non_finite_bundle == 50
    assert len(verdict(figures, BUDGETS["bf16"])) > 1


def test_nothing_compared_never_passes() -> None:
    figures = ParityAccumulator().figures()
    assert "no token was compared" in verdict(figures, BUDGETS["bf16"])


def test_verdict_names_each_violated_bound() -> None:
    strict = Budget(0, 0, 0, 1, 0, reason="")
    words = verdict(measure(REFERENCE, BUNDLE), strict)
    assert len(words) == 5
    for name in ("relative error", "mean KL", "largest KL", "top-1", "perplexity"):
        assert sum(name in word for word in words) == 1, name


def test_bounds_are_inclusive() -> None:
    figures = replace(measure(REFERENCE, REFERENCE), mean_kl=1e-6, top1_agreement=0.999)
    assert verdict(figures, BUDGETS["fp32"]) == ()
    assert len(verdict(replace(figures, mean_kl=1.01e-6, top1_agreement=0.998), BUDGETS["fp32"])) == 2


def test_a_better_perplexity_is_a_change_too() -> None:
    figures = replace(measure(REFERENCE, REFERENCE), bundle_perplexity=1.0)
    assert any("perplexity changes by -" in word for word in verdict(figures, BUDGETS["bf16"]))


def test_budgets_widen_with_the_precision() -> None:
    fp32, fp16, bf16 = (BUDGETS[name] for name in ("fp32", "fp16", "bf16"))
    for name in ("max_relative_error", "mean_kl", "max_kl", "perplexity_change"):
        assert getattr(fp32, name) < getattr(fp16, name) < getattr(bf16, name), name
    assert fp32.top1_agreement > fp16.top1_agreement > bf16.top1_agreement


def test_figures_are_json() -> None:
    figures = measure(REFERENCE, BUNDLE)
    assert json.loads(json.dumps(figures.to_json()))["tokens"] == 50
    assert json.loads(json.dumps(ParityAccumulator().figures().to_json(), allow_nan=False))["mean_kl"] is None


@pytest.mark.parametrize(
    ("rows", "targets", "positions", "message"),
    [
        (2, [1, 1, 1], [0, 1, 2], "logits are"),
        (3, [1, 1], [0, 1, 2], "targets"),
        (3, [1, 1, 1], [0, 1, -2], "negative"),
        (3, [1, 40, 1], [0, 1, 2], "Target 40"),
    ],
)
def test_blocks_that_do_not_fit_together(
    rows: int, targets: list[int], positions: list[int], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        ParityAccumulator().add(REFERENCE[:3], BUNDLE[:rows], targets, positions)
