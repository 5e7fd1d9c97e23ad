"""How a product rounds, and how far from the exact result that is said to be."""

import pytest
import torch
from torch import Tensor

from gemma_export.calibration import arithmetic
from gemma_export.calibration.arithmetic import Arithmetic, Target
from gemma_export.graphs.formats import WeightFormat
from gemma_export.graphs.quantization import round_per_tensor, round_per_token, round_trip


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_each_rounding_of_the_input_is_that_of_the_graph():
    x, blocks = random(5, 96), WeightFormat(8, 16)
    assert torch.equal(Arithmetic("w8", blocks, "none").round_input(x), x)
    assert torch.equal(Arithmetic("w8a8-token", WeightFormat(8), "token").round_input(x), round_per_token(x))
    assert torch.equal(Arithmetic("w8", blocks, "block").round_input(x), round_per_token(x, 16))
    # The largest blocks that divide the row.
    assert torch.equal(Arithmetic("w8", WeightFormat(8), "block").round_input(x), round_per_token(x, 32))
    static = Arithmetic("w8a8-tensor", WeightFormat(8), "tensor").with_input_scale(0.02)
    assert torch.equal(static.round_input(x), round_per_tensor(x, 0.02))


@pytest.mark.parametrize("rounding", ["nearest", "mse"])
@pytest.mark.parametrize("values", [1, 96, 2**18], ids=lambda values: f"{values} values at a time")
def test_weights_are_rounded_as_they_are_stored(rounding, values, monkeypatch):
    monkeypatch.setattr(arithmetic, "SLICE_VALUES", values)
    rows, form = random(7, 32), WeightFormat(4, 16, negative_scales=True)
    assert torch.equal(
        Arithmetic("w4", form, "block").round_weight(rows, rounding), round_trip(rows, form, rounding)
    )


def test_the_error_is_relative_to_each_token():
    x, rows = random(7, 16), random(9, 16, seed=1)
    target = Target(x, rows)
    assert target.error(x, rows) == 0
    # Outputs that are all a tenth too large are off by a hundredth of their square.
    assert target.error(1.1 * x, rows) == pytest.approx(0.01, rel=1e-4)
    one_wrong = x.clone()
    one_wrong[3] = 0
    assert target.error(one_wrong, rows) == pytest.approx(1 / 7, rel=1e-4)


def test_the_size_of_a_token_does_not_matter():
    x, rows, rounded = random(7, 16), random(9, 16, seed=1), random(9, 16, seed=2)
    sizes = torch.logspace(0, 1, 7)[:, None]
    assert Target(x * sizes, rows).error(x * sizes, rounded) == pytest.approx(
        Target(x, rows).error(x, rounded), rel=1e-4
    )


def test_a_token_without_outputs_does_not_decide_alone():
    x, rows = random(4, 16), random(9, 16, seed=1)
    x[0] = 0
    shifted = x.clone()
    shifted[0] = 1e-3
    assert Target(x, rows).error(shifted, rows) < 1e-2
    assert Target(torch.zeros(2, 16), rows).error(torch.zeros(2, 16), rows) == 0
