"""What is decided of a layer: the form that is wanted where it bears it, and always the least error."""

import pytest
import torch
from torch import Tensor

from gemma_export.calibration import recipe as module
from gemma_export.calibration.arithmetic import Arithmetic, Target
from gemma_export.calibration.recipe import Decision, Layer, Recipe, decide
from gemma_export.calibration.statistics import InputStatistics
from gemma_export.errors import CheckpointError
from gemma_export.graphs.formats import WeightFormat
from gemma_export.graphs.quantization import decode, round_trip
from gemma_export.graphs.tensors import InMemory

pytestmark = pytest.mark.usefixtures("one_thread")

PER_TOKEN = Arithmetic("w8a8-token", WeightFormat(8), "token")
STATIC = Arithmetic("w8a8-tensor", WeightFormat(8), "tensor")
WEIGHTS_ONLY = Arithmetic("w8", WeightFormat(8), "none")
FOUR_BITS = Arithmetic("w4", WeightFormat(4, 32, negative_scales=True), "block")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def layer(x: Tensor, weight: Tensor | None = None, *, smoothable: bool = False) -> Layer:
    weight = random(96, x.shape[1], seed=7) if weight is None else weight
    inputs = InputStatistics(x.shape[1], len(x), hessian=True)
    inputs.add(x)
    return Layer(InMemory("layers.0.some", weight), inputs, smoothable=smoothable)


def outliers(factor: float = 64.0) -> tuple[Tensor, Tensor]:
    x, weight = random(200, 64), random(96, 64, seed=7)
    x[:, [3, 17, 40]] *= factor
    weight[:, [3, 17, 40]] /= factor
    return x, weight


def spiky() -> Tensor:
    """Tokens with a few values that are far larger than the rest, in other channels each."""
    x = random(200, 64)
    x[torch.arange(200), torch.arange(200) % 64] *= 100
    return x


def error_as_decided(subject: Layer, arithmetic: Arithmetic, decision: Decision) -> float:
    """The error of the outputs over all rows, recomputed from what the decision says."""
    weight = subject.weight.read(0, subject.weight.shape[0]).float()
    s = torch.ones(weight.shape[1]) if decision.smoothing is None else decision.smoothing
    if decision.scales.activation_scale is not None:
        arithmetic = arithmetic.with_input_scale(decision.scales.activation_scale)
    if decision.stored is None:
        rounded = arithmetic.round_weight(weight * s, "mse" if decision.scales.method == "mse" else "nearest")
    else:
        rounded = decode(*decision.stored, arithmetic.weights)
    return Target(subject.x, weight).error(arithmetic.round_input(subject.x / s), rounded)


def test_an_ordinary_layer_takes_the_form_that_is_wanted():
    subject = layer(random(200, 64))
    decision = decide(subject, Recipe(PER_TOKEN, WEIGHTS_ONLY))
    assert (decision.scales.form, decision.scales.method, decision.scales.block) == (
        "w8a8-token",
        "nearest",
        None,
    )
    assert decision.scales.activation_scale is None
    assert decision.smoothing is None
    assert decision.stored is None
    assert set(decision.scales.candidates or {}) == {"w8a8-token with x as it is"}
    assert decision.scales.error == pytest.approx(error_as_decided(subject, PER_TOKEN, decision))


def test_a_layer_that_cannot_bear_rounded_inputs_takes_the_other():
    subject = layer(spiky())
    decision = decide(subject, Recipe(PER_TOKEN, WEIGHTS_ONLY))
    assert decision.scales.form == "w8"
    tried = decision.scales.candidates or {}
    assert tried["w8a8-token"] > 4 * tried["w8a8-token with x as it is"]
    assert decision.scales.error == pytest.approx(error_as_decided(subject, WEIGHTS_ONLY, decision))


def test_without_another_form_it_keeps_the_one_it_has():
    assert decide(layer(spiky()), Recipe(PER_TOKEN)).scales.form == "w8a8-token"


def test_the_other_form_has_to_be_better():
    bad = Arithmetic("w8", WeightFormat(4), "token")
    assert decide(layer(spiky()), Recipe(PER_TOKEN, bad)).scales.form == "w8a8-token"


def test_an_error_next_to_nothing_is_borne(monkeypatch):
    monkeypatch.setattr(module, "DEAR", 0.0)
    monkeypatch.setattr(module, "NEGLIGIBLE", 0.0)
    subject = layer(random(200, 64))
    assert decide(subject, Recipe(PER_TOKEN, WEIGHTS_ONLY)).scales.form == "w8"
    error = decide(subject, Recipe(PER_TOKEN)).scales.error
    assert error is not None
    monkeypatch.setattr(module, "NEGLIGIBLE", error)
    assert decide(subject, Recipe(PER_TOKEN, WEIGHTS_ONLY)).scales.form == "w8a8-token"


@pytest.mark.parametrize("arithmetic", [PER_TOKEN, STATIC], ids=lambda a: a.form)
def test_outlier_channels_are_smoothed_away(arithmetic):
    x, weight = outliers()
    subject = layer(x, weight, smoothable=True)
    decision = decide(subject, Recipe(arithmetic, WEIGHTS_ONLY))
    assert decision.scales.form == arithmetic.form
    assert decision.smoothing is not None
    plain = decide(layer(x / _planted(x), weight * _planted(x)), Recipe(arithmetic)).scales.error
    assert plain is not None
    assert decision.scales.error == pytest.approx(error_as_decided(subject, arithmetic, decision), rel=1e-3)
    assert decision.scales.error < 1.2 * plain
    assert (decision.scales.candidates or {})[f"{arithmetic.form} without smoothing"] > 10 * plain


def _planted(x: Tensor) -> Tensor:
    factor = torch.ones(x.shape[1])
    factor[[3, 17, 40]] = 64
    return factor


def test_what_cannot_be_smoothed_is_not():
    x, weight = outliers()
    decision = decide(layer(x, weight), Recipe(PER_TOKEN, WEIGHTS_ONLY))
    assert decision.smoothing is None
    assert decision.scales.form == "w8"


def test_smoothing_that_spoils_the_weight_counts_as_a_cost_of_rounding_x():
    # Channels that are large now and then: with one scale only the strongest smoothing helps, and W, whose
    # columns it makes as different as the channels, then loses as much as x does.
    often = torch.rand(400, 64, generator=torch.Generator().manual_seed(1)) < 0.3
    x = random(400, 64) * torch.where(often, 1.0, 0.05) * torch.logspace(-0.75, 0.75, 64)
    decision = decide(layer(x, smoothable=True), Recipe(STATIC, WEIGHTS_ONLY))
    assert decision.scales.form == "w8"


def test_a_static_scale_is_of_all_tokens_and_of_smoothed_inputs():
    x = random(3000, 64)
    x[1234, 5] = 12.0
    decision = decide(layer(x), Recipe(STATIC))
    assert decision.scales.activation_scale == pytest.approx(12.0 / 127)
    x, weight = outliers()
    subject = layer(x, weight, smoothable=True)
    decision = decide(subject, Recipe(STATIC))
    assert decision.smoothing is not None
    assert decision.scales.activation_scale == pytest.approx(
        float((x / decision.smoothing).abs().max()) / 127
    )


def test_the_observer_proposes_the_static_scale():
    scales = {
        name: decide(layer(random(200, 64) ** 3), Recipe(STATIC, observer=name)).scales.activation_scale
        for name in ("absmax", "mse")
    }
    assert scales["mse"] is not None
    assert scales["absmax"] is not None
    assert scales["mse"] < scales["absmax"]


def correlated(tokens: int = 400) -> Tensor:
    return random(tokens, 4) @ random(4, 64, seed=1) + 0.3 * random(tokens, 64, seed=2)


def test_four_bits_are_chosen_one_by_one():
    subject = layer(correlated())
    decision = decide(subject, Recipe(FOUR_BITS))
    assert (decision.scales.form, decision.scales.method, decision.scales.block) == ("w4", "gptq", 32)
    assert decision.stored is not None
    codes, scales = decision.stored
    assert (codes.dtype, codes.shape, scales.shape) == (torch.int8, (96, 64), (96, 2))
    tried = decision.scales.candidates or {}
    assert decision.scales.error is not None
    assert decision.scales.error < tried["mse"] < tried["nearest without smoothing"]
    assert decision.scales.error == pytest.approx(error_as_decided(subject, FOUR_BITS, decision), rel=1e-3)


def test_four_bits_are_rounded_alone_where_that_is_better():
    subject = layer(correlated())
    # What the layer was said to read has nothing to do with what it reads.
    other = 10 * correlated().flip(1).roll(7, 1)
    subject.inputs.hessian[0].copy_(other.T @ other)
    decision = decide(subject, Recipe(FOUR_BITS))
    assert decision.scales.method == "mse"
    assert decision.stored is None
    tried = decision.scales.candidates or {}
    assert decision.scales.error is not None
    assert decision.scales.error <= tried["gptq"]
    assert decision.scales.error == pytest.approx(error_as_decided(subject, FOUR_BITS, decision), rel=1e-3)


def test_four_bits_of_smoothed_columns():
    x, weight = outliers(1000.0)
    subject = layer(x, weight, smoothable=True)
    decision = decide(subject, Recipe(FOUR_BITS))
    assert decision.smoothing is not None
    assert decision.scales.error == pytest.approx(error_as_decided(subject, FOUR_BITS, decision), rel=1e-2)
    assert decision.scales.error < 0.5 * (decision.scales.candidates or {})["nearest without smoothing"]


def test_codes_are_chosen_for_rows_as_they_will_be_divided():
    x, weight = correlated(), random(96, 64, seed=7)
    divisors = torch.logspace(-1, 1, 40)
    inputs = InputStatistics(64, len(x), hessian=True)
    inputs.add(x)
    plain = decide(layer(x, weight), Recipe(FOUR_BITS))
    decision = decide(Layer(InMemory("w", weight), inputs, divisors=divisors), Recipe(FOUR_BITS))
    assert decision.scales == plain.scales  # What is tried is what comes out in the end.
    assert decision.stored is not None
    assert plain.stored is not None
    scales = decision.stored[1]
    assert torch.equal(scales.bfloat16().float(), scales)
    assert torch.equal(
        decode(*decision.stored, FOUR_BITS.weights)[:56], decode(*plain.stored, FOUR_BITS.weights)[:56]
    )
    undone = decode(*decision.stored, FOUR_BITS.weights)
    undone[56:] *= divisors[:, None]
    exact = Target(x, weight)
    errors = [exact.error(x, rows) for rows in (undone, decode(*plain.stored, FOUR_BITS.weights))]
    # Scales of divided rows fall between other numbers of 8 digits; another row's divisor is 12 % off.
    assert errors[0] == pytest.approx(errors[1], rel=0.05)


def test_a_large_weight_is_judged_by_rows_spread_over_it(monkeypatch):
    weight = random(500, 64, seed=7)
    weight[::2] *= 3
    whole = decide(layer(random(200, 64), weight), Recipe(PER_TOKEN)).scales.error
    read: list[tuple[int, int]] = []

    class Counted(InMemory):
        def read(self, start: int, stop: int) -> Tensor:
            read.append((start, stop))
            return super().read(start, stop)

    monkeypatch.setattr(module, "MOST_ROWS", 80)
    inputs = InputStatistics(64, 200)
    inputs.add(random(200, 64))
    part = decide(Layer(Counted("weight", weight), inputs), Recipe(PER_TOKEN)).scales.error
    assert read == [(492 * i // 10, 492 * i // 10 + 8) for i in range(10)]
    assert part == pytest.approx(whole, rel=0.1)


def test_the_blocks_in_which_a_weight_is_read_change_nothing(monkeypatch):
    x = correlated()
    whole = decide(layer(x, smoothable=True), Recipe(FOUR_BITS))
    monkeypatch.setattr(module, "BLOCK_BYTES", 64 * 4 * 7)  # 7 rows
    parts = decide(layer(x, smoothable=True), Recipe(FOUR_BITS))
    assert whole.stored is not None
    assert parts.stored is not None
    # Products of other shapes sum in another order, which may move a number from one code to the next.
    assert (whole.stored[0] != parts.stored[0]).float().mean() < 0.01


def test_a_few_rows_are_taken_whole():
    subject = layer(random(200, 64), random(3, 64))
    assert torch.equal(subject.rows, random(3, 64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_may_have_any_format(dtype):
    weight = random(96, 64, seed=7).to(dtype)
    subject = layer(random(200, 64), weight)
    decision = decide(subject, Recipe(PER_TOKEN))
    expected = Target(subject.x, weight.float()).error(
        PER_TOKEN.round_input(subject.x), round_trip(weight.float(), WeightFormat(8))
    )
    assert decision.scales.error == pytest.approx(expected)


def test_a_weight_that_is_not_finite_is_refused():
    weight = random(96, 64)
    weight[0, 0] = torch.nan
    with pytest.raises(CheckpointError, match="holds NaN or infinity"):
        layer(random(200, 64), weight)
