"""Smoothing vectors: what they promise whatever they are, and that the search finds one that is needed."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gemma_export.calibration.arithmetic import Arithmetic, Target
from gemma_export.calibration.smoothing import FARTHEST, WORTHWHILE, Vectors, search
from gemma_export.calibration.statistics import InputStatistics
from gemma_export.graphs.formats import WeightFormat

pytestmark = pytest.mark.usefixtures("one_thread")

OUTLIERS = [3, 17, 40]
PER_TOKEN = Arithmetic("w8a8-token", WeightFormat(8), "token")
FOUR_BITS = Arithmetic("w4", WeightFormat(4, 32, negative_scales=True), "block")


def layer(factor: float = 1.0, channels: int = 64) -> tuple[Tensor, Tensor]:
    """Inputs and rows of a layer with some channels `factor` times larger, and their columns smaller."""
    random = torch.Generator().manual_seed(2)
    x, rows = torch.randn(200, channels, generator=random), torch.randn(48, channels, generator=random)
    x[:, OUTLIERS] *= factor
    rows[:, OUTLIERS] /= factor
    return x, rows


def vectors(x: Tensor, rows: Tensor) -> Vectors:
    seen = InputStatistics(x.shape[1], len(x))
    seen.add(x)
    return Vectors(seen, rows.abs().amax(0))


def error_of(x: Tensor, rows: Tensor, arithmetic: Arithmetic):
    target = Target(x, rows)

    def error(vector: Tensor | None) -> float:
        s = torch.ones(x.shape[1]) if vector is None else vector
        return target.error(arithmetic.round_input(x / s), arithmetic.round_weight(rows * s))

    return error


@pytest.mark.parametrize("family", ["smoothquant", "awq"])
@given(st.floats(0.05, 1.0), st.floats(1.0, 1e6))
def test_a_vector_is_positive_and_centred(family, strength, factor):
    vector = vectors(*layer(factor)).vector(family, strength)
    assert (vector > 0).all()
    assert vector.isfinite().all()
    assert vector.min() >= 1 / FARTHEST
    assert vector.max() <= FARTHEST
    assert float(vector.max() * vector.min()) == pytest.approx(1, rel=1e-4)


def test_the_families_are_those_of_the_papers():
    x, rows = layer(8.0)
    found = vectors(x, rows)
    shared = x.abs().amax(0) ** 0.6 / rows.abs().amax(0) ** 0.4
    spared = x.abs().mean(0) ** 0.6
    for family, expected in (("smoothquant", shared), ("awq", spared)):
        ratio = found.vector(family, 0.6) / expected
        torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio))


def test_channels_and_columns_of_zeros_have_a_finite_factor():
    x, rows = layer()
    x[:, 5] = 0
    rows[:, 6] = 0
    found = vectors(x, rows)
    for strength in (0.1, 1.0):
        assert found.vector("smoothquant", strength).isfinite().all()
        assert found.vector("awq", strength).isfinite().all()


@pytest.mark.parametrize("arithmetic", [PER_TOKEN, FOUR_BITS], ids=["8 bits per token", "4 bits"])
@pytest.mark.parametrize("factor", [64.0, 1000.0])
def test_outlier_channels_cost_nothing_once_smoothed(arithmetic, factor):
    plain = error_of(*layer(), arithmetic)(None)
    x, rows = layer(factor)
    found = search(vectors(x, rows), error_of(x, rows, arithmetic))
    assert found.plain > 2 * plain
    assert found.vector is not None
    # A vector undoes what was planted, but for where its strength lies between those that are tried.
    assert found.error < 1.1 * plain
    assert found.error == pytest.approx(error_of(x, rows, arithmetic)(found.vector))


def test_what_gains_next_to_nothing_is_left_out():
    x, rows = layer()
    calls: list[Tensor | None] = []

    def error(vector: Tensor | None) -> float:
        calls.append(vector)
        return 1.0 if vector is None else WORTHWHILE + 0.001

    found = search(vectors(x, rows), error)
    assert (found.name, found.vector, found.error, found.plain) == ("none", None, 1.0, 1.0)
    assert len(calls) > 20


def test_the_least_error_wins_wherever_it_is():
    x, rows = layer(100.0)
    found = vectors(x, rows)
    wanted = found.vector("smoothquant", 0.75)  # Between the strengths that are tried at first.

    def error(vector: Tensor | None) -> float:
        return 1e3 if vector is None else float((vector.log() - wanted.log()).square().sum())

    best = search(found, error)
    assert best.name == "smoothquant 0.75"
    assert best.error == 0


def test_without_vectors_there_is_none():
    found = search(None, lambda vector: 0.5 if vector is None else 0.0)
    assert (found.vector, found.error) == (None, 0.5)
