import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_export.errors import GemmaExportError
from gemma_export.runtime.sampling import Sampler, SamplingOptions, distribution, draw, greedy, penalize


@st.composite
def some_logits(draw_: st.DrawFn) -> np.ndarray:
    """Multiples of 1/4, so that there are ties and nothing is lost to rounding."""
    random = np.random.default_rng(draw_(st.integers(0, 2**32)))
    return (random.integers(-40, 40, draw_(st.integers(1, 300))) / 4).astype(np.float32)


def brute_force(logits: np.ndarray, options: SamplingOptions) -> dict[int, float]:
    """Top-k and top-p by sorting everything, from the definitions."""
    scaled = logits.astype(np.float64) / options.temperature
    weights = np.exp(scaled - scaled.max())
    ids = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    if options.top_k:
        last = logits[ids[min(options.top_k, len(ids)) - 1]]
        ids = [token for token in ids if logits[token] >= last]
    kept, mass, total = [], 0.0, weights[ids].sum()
    for token in ids:
        if options.top_p < 1 and mass >= options.top_p:
            break
        kept.append(token)
        mass += weights[token] / total
    return {token: weights[token] / weights[kept].sum() for token in kept}


@settings(max_examples=200, deadline=None)
@given(some_logits(), st.floats(0.2, 3), st.integers(0, 320), st.floats(0.01, 0.999) | st.just(1.0))
def test_distribution_is_the_definition(logits: np.ndarray, temperature: float, k: int, p: float) -> None:
    options = SamplingOptions(temperature=temperature, top_k=k, top_p=p)
    ids, probabilities = distribution(logits, options)
    expected = brute_force(logits, options)
    found = dict(zip(ids.tolist(), probabilities.tolist(), strict=True))
    # A cumulated mass that comes within rounding of top_p may fall on either side of it.
    if found.keys() != expected.keys():
        assert abs(len(found) - len(expected)) == 1
        return
    assert found == pytest.approx(expected)


@st.composite
def many_logits(draw_: st.DrawFn) -> np.ndarray:
    """Some thousands, from nearly flat to steep, with or without many ties."""
    random = np.random.default_rng(draw_(st.integers(0, 2**32)))
    logits = random.standard_normal(draw_(st.integers(1, 6000))) * draw_(st.sampled_from([0.01, 1, 5, 30]))
    return (logits.round(1) if draw_(st.booleans()) else logits).astype(np.float32)


@settings(max_examples=200, deadline=None)
@given(many_logits(), st.floats(0.01, 0.999))
def test_top_p_keeps_exactly_what_sorting_everything_keeps(logits: np.ndarray, top_p: float) -> None:
    weights = np.exp(logits.astype(np.float64) - logits.max())
    order = np.argsort(-weights, kind="stable")  # the lower id first among equals
    reached = weights[order].cumsum() >= top_p * weights.sum()
    expected = order[: int(reached.argmax()) + 1]
    ids, probabilities = distribution(logits, SamplingOptions(temperature=1.0, top_p=top_p))
    assert sorted(ids.tolist()) == sorted(expected.tolist())
    np.testing.assert_allclose(probabilities, weights[ids] / weights[ids].sum(), rtol=1e-12)


@settings(max_examples=200, deadline=None)
@given(many_logits(), st.integers(1, 6100))
def test_top_k_keeps_exactly_what_sorting_everything_keeps(logits: np.ndarray, top_k: int) -> None:
    smallest = np.sort(logits)[::-1][:top_k][-1]
    ids, _ = distribution(logits, SamplingOptions(temperature=1.0, top_k=top_k))
    assert ids.tolist() == np.flatnonzero(logits >= smallest).tolist()


@given(st.lists(st.integers(0, 3), min_size=1, max_size=2000).filter(any), st.floats(0, 1, exclude_max=True))
def test_a_draw_is_where_the_cumulated_weights_pass_the_number(counts: list[int], uniform: float) -> None:
    weights = np.array(counts, np.float64)  # Whole numbers: no sum is rounded, in whatever order.
    index = draw(weights, uniform)
    assert sum(counts[:index]) <= uniform * sum(counts) < sum(counts[: index + 1])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
@pytest.mark.parametrize(
    ("top_k", "top_p"), [(0, 1.0), (40, 1.0), (0, 0.9), (50, 0.8), (5000, 0.999), (1, 1.0)]
)
def test_distribution_is_that_of_transformers(temperature: float, top_k: int, top_p: float) -> None:
    torch = pytest.importorskip("torch")
    warpers = pytest.importorskip("transformers.generation.logits_process")
    logits = (np.random.default_rng(0).standard_normal(3000) * 3).astype(np.float32)
    scores = warpers.TemperatureLogitsWarper(temperature)(None, torch.tensor(logits)[None])
    if top_k:
        scores = warpers.TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = warpers.TopPLogitsWarper(top_p)(None, scores)
    expected = scores.softmax(-1)[0].numpy()
    found = np.zeros(3000)
    ids, probabilities = distribution(
        logits, SamplingOptions(temperature=temperature, top_k=top_k, top_p=top_p)
    )
    found[ids] = probabilities
    assert (found > 0).sum() == (expected > 0).sum()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-9)


def test_repetition_penalty_is_that_of_transformers() -> None:
    torch = pytest.importorskip("torch")
    processors = pytest.importorskip("transformers.generation.logits_process")
    logits = np.random.default_rng(1).standard_normal(50).astype(np.float32)
    history = [3, 3, 7, 49, 0]
    expected = processors.RepetitionPenaltyLogitsProcessor(1.3)(
        torch.tensor(history)[None], torch.tensor(logits)[None]
    )
    before = logits.copy()
    np.testing.assert_allclose(penalize(logits, history, 1.3), expected[0].numpy(), rtol=1e-6)
    np.testing.assert_array_equal(logits, before)


def test_greedy_takes_the_lowest_id_of_equals() -> None:
    assert greedy(np.array([1, 5, 5, 2], np.float32)) == 1
    assert Sampler(SamplingOptions())(np.array([1, 5, 5, 2], np.float32), []) == 1


def test_greedy_heeds_the_repetition_penalty() -> None:
    sampler = Sampler(SamplingOptions(repetition_penalty=2.0))
    assert sampler(np.array([3, 5, 1], np.float32), [1]) == 0


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite(value: float, temperature: float) -> None:
    logits = np.array([1, value, 2], np.float32)
    with pytest.raises(GemmaExportError, match="largest logit is"):
        Sampler(SamplingOptions(temperature=temperature))(logits, [])


def test_ruled_out_tokens_are_never_drawn() -> None:
    logits = np.array([0, -math.inf, 0], np.float32)
    sampler = Sampler(SamplingOptions(temperature=1.0, seed=0))
    assert {sampler(logits, []) for _ in range(100)} == {0, 2}


def test_draws_follow_the_probabilities() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.2], np.float32))
    sampler = Sampler(SamplingOptions(temperature=1.0, seed=0))
    counts = Counter(sampler(logits, []) for _ in range(4000))
    # Three standard deviations of 4000 draws are below 0.025.
    assert [counts[token] / 4000 for token in range(3)] == pytest.approx([0.5, 0.3, 0.2], abs=0.025)


def test_a_draw_falls_on_something() -> None:
    probabilities = np.array([0.25, 0.0, 0.75])
    assert draw(probabilities, 0.0) == 0
    assert draw(probabilities, 0.25) == 2
    assert draw(probabilities, math.nextafter(1.0, 0.0)) == 2


def test_a_tiny_temperature_is_greedy() -> None:
    logits = np.array([1.0, 3.0, 2.0], np.float32)
    assert Sampler(SamplingOptions(temperature=1e-30, seed=0))(logits, []) == 1


def test_a_flat_distribution_is_wider_than_the_first_look() -> None:
    ids, _ = distribution(np.zeros(5000, np.float32), SamplingOptions(temperature=1.0, top_p=0.5))
    assert len(ids) == pytest.approx(2500, abs=1)
