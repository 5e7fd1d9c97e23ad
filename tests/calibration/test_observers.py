"""Observers: each against a search over all values at hand, and what none of them may trip over."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gemma_export.calibration.observers import (
    HIGHEST_CODE,
    OBSERVERS,
    SMALLEST_SCALE,
    AbsmaxObserver,
    ChannelAbsmax,
    EntropyObserver,
    Histogram,
    MSEObserver,
    ObserverName,
    PercentileObserver,
    make_observer,
)
from gemma_export.errors import CalibrationError

every_observer = pytest.mark.parametrize("name", OBSERVERS)
magnitudes = st.floats(-(2.0**90), 2.0**90, width=32)
pieces = st.lists(st.lists(magnitudes, max_size=20), min_size=1, max_size=6)


def values(kind: str, count: int = 20_000) -> Tensor:
    random = torch.Generator().manual_seed(5)
    normal = torch.randn(count, generator=random)
    match kind:
        case "normal":
            return normal
        case "heavy tails":
            return normal**3
        case "mostly zero":  # As what a gated MLP multiplies.
            return torch.where(torch.rand(count, generator=random) < 0.8, 0.0, normal.exp())
        case _:
            return torch.cat((normal, torch.tensor([200.0])))


kinds = pytest.mark.parametrize("kind", ["normal", "heavy tails", "mostly zero", "one outlier"])


def threshold(name: ObserverName, *parts: Tensor) -> float:
    observer = make_observer(name)
    for part in parts:
        observer.add(part)
    return observer.scale() * HIGHEST_CODE


def brute_counts(x: Sequence[float], width: float, bins: int) -> np.ndarray:
    counts = np.zeros(bins, np.int64)
    for value in map(abs, x):
        if value:
            counts[math.ceil(value / width) - 1] += 1
    return counts


@given(pieces)
def test_a_histogram_that_grew_is_the_one_of_all_values_together(parts):
    seen = Histogram(bins=64)
    for part in parts:
        seen.add(torch.tensor(part, dtype=torch.float32))
    everything = [value for part in parts for value in part]
    assert seen.largest == max(map(abs, everything), default=0.0)
    if seen.largest:
        assert seen.width == 2.0 ** math.log2(seen.width)
        assert 32 * seen.width < seen.largest <= 64 * seen.width
        np.testing.assert_array_equal(seen.counts, brute_counts(everything, seen.width, 64))
        np.testing.assert_array_equal(
            seen.coarse(16).counts, brute_counts(everything, seen.coarse(16).width, 16)
        )


@given(pieces)
def test_absmax_clips_nothing(parts):
    observer = AbsmaxObserver()
    for part in parts:
        observer.add(torch.tensor(part))
    largest = max((abs(value) for part in parts for value in part), default=0.0)
    expected = max(np.float32(largest) / 127, SMALLEST_SCALE) if largest else 1.0
    assert observer.scale() == pytest.approx(expected, rel=1e-7)


@kinds
@pytest.mark.parametrize("percent", [90.0, 99.0, 99.99])
def test_percentile_is_exact_to_a_bin(kind, percent):
    x = values(kind)
    seen, observer = Histogram(), PercentileObserver(percent)
    for part in x.split(3000):
        seen.add(part)
        observer.add(part)
    ordered = x[x != 0].abs().sort().values
    exact = float(ordered[math.ceil(percent / 100 * len(ordered)) - 1])
    assert exact <= observer.scale() * HIGHEST_CODE * (1 + 1e-6)
    assert observer.scale() * HIGHEST_CODE <= exact + seen.width


def squared_error(x: Tensor, limit: float) -> float:
    step = limit / HIGHEST_CODE
    rounded = (x.double() / step).round().clamp(-HIGHEST_CODE, HIGHEST_CODE) * step
    return float((rounded - x).square().sum())


@kinds
def test_mse_is_a_search_over_the_values_themselves(kind):
    x = values(kind)
    found = threshold("mse", *x.split(3000))
    largest = float(x.abs().max())
    least = min(squared_error(x, largest * 2 ** (-i / 64)) for i in range(6 * 64))
    # A bin is at most a fourth of a step wide, and mostly far less; half as many thresholds were tried.
    assert squared_error(x, found) <= 1.01 * least


def divergence(counts: Sequence[int], within: int, levels: int = 128) -> float:
    """KL(P ‖ Q) in plain Python, level by level."""
    real = [float(count) for count in counts[:within]]
    spread = [0.0] * within
    groups: dict[int, list[int]] = {}
    for i in range(within):
        groups.setdefault(i * levels // within, []).append(i)
    for group in groups.values():
        filled = [i for i in group if counts[i]]
        for i in filled:
            spread[i] = sum(counts[j] for j in group) / len(filled)
    if not sum(real):
        return math.inf
    real[max(i for i in range(within) if counts[i])] += sum(counts[within:])
    p, q = sum(real), sum(spread)
    total = 0.0
    for a, b in zip(real, spread, strict=True):
        if a:
            total += a / p * math.log((a / p) / (b / q)) if b else math.inf
    return total


@kinds
def test_entropy_is_a_search_over_all_thresholds(kind):
    x = values(kind, 3000)
    seen = Histogram(EntropyObserver.BINS)
    seen.add(x)
    counts = seen.counts.tolist()
    found = threshold("entropy", *x.split(700))
    within = math.ceil(found / seen.width - 1e-6)
    every_third = {i: divergence(counts, i) for i in range(128, seen.used + 1, 3)}
    # The best of those a 32nd apart: the divergence changes slowly where it is small.
    assert divergence(counts, within) <= 1.1 * min(every_third.values())


def test_all_but_absmax_clip_an_outlier():
    x = values("one outlier")
    assert threshold("absmax", x) == pytest.approx(200)
    for name in ("percentile", "entropy"):
        assert threshold(name, x) < 20, name
    # Its own error is as large as what 20,000 values of 1 lose by steps of 200 / 127.
    assert 100 < threshold("mse", x) < 190


@every_observer
def test_the_order_and_the_pieces_do_not_matter(name):
    x = values("heavy tails", 4000)
    together = threshold(name, x)
    assert threshold(name, *x.split(37)) == together
    assert threshold(name, *x.sort().values.flip(0).split(501)) == together


@every_observer
def test_sizes_and_signs_do_not_matter(name):
    x = values("heavy tails", 4000)
    assert threshold(name, -x) == threshold(name, x)
    # A power of two moves every value to the bin of the same number.
    assert threshold(name, x * 2.0**40) == threshold(name, x) * 2.0**40
    assert threshold(name, x.reshape(20, 10, 20)) == threshold(name, x)


@every_observer
@given(parts=pieces)
def test_a_scale_is_positive_and_clips_all_or_some(name, parts):
    tensors = [torch.tensor(part, dtype=torch.float32) for part in parts]
    scale = threshold(name, *tensors) / HIGHEST_CODE
    largest = max(float(part.abs().max()) for part in [*tensors, torch.zeros(1)] if len(part))
    assert SMALLEST_SCALE <= scale < math.inf
    if largest:
        assert scale <= max(largest / HIGHEST_CODE, SMALLEST_SCALE) * (1 + 1e-6)


@every_observer
def test_zeros_have_a_scale_that_any_format_can_hold(name):
    assert threshold(name, torch.zeros(3, 4)) == HIGHEST_CODE
    assert threshold(name) == HIGHEST_CODE
    assert threshold(name, torch.empty(0, 4)) == HIGHEST_CODE


@every_observer
def test_one_value_is_its_own_threshold(name):
    # The mse may clip one value by the rounding of the middle of its bin.
    assert threshold(name, torch.tensor([0.0, -3.0, 0.0])) == pytest.approx(3.0, rel=0.05)


@every_observer
@pytest.mark.parametrize("tiny", [1e-30, 1e-38, 1e-45])
def test_next_to_nothing_has_a_scale_that_can_be_divided_by(name, tiny):
    x = torch.tensor([tiny, -tiny, tiny / 2])
    scale = threshold(name, x) / HIGHEST_CODE
    assert (x / scale).isfinite().all()


@every_observer
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused(name, value):
    observer = make_observer(name)
    with pytest.raises(CalibrationError, match="NaN or infinite"):
        observer.add(torch.tensor([1.0, value, 2.0]))


@every_observer
def test_large_values_whose_sum_overflows_are_not_refused(name):
    assert threshold(name, torch.full((100,), 3e38)) == pytest.approx(3e38, rel=0.05)


def test_channels_have_a_scale_each():
    seen = ChannelAbsmax(3)
    seen.add(torch.tensor([[1.0, -8.0, 0.0], [-2.0, 4.0, 0.0]]))
    seen.add(torch.empty(0, 3))
    seen.add(torch.tensor([[[0.5, 9.0, 0.0]]]))
    assert seen.largest.tolist() == [2.0, 9.0, 0.0]
    assert seen.scale().tolist() == pytest.approx([2 / 127, 9 / 127, 1.0])
    with pytest.raises(CalibrationError):
        seen.add(torch.tensor([[1.0, math.nan, 1.0]]))


def test_every_observer_has_a_name():
    kinds = [AbsmaxObserver, PercentileObserver, EntropyObserver, MSEObserver]
    assert [type(make_observer(name)) for name in OBSERVERS] == kinds
