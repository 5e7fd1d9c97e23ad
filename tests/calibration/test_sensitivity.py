"""Which layers keep 16 bits: the smallest bundle within the budget, and why."""

import json
import math
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_export.calibration import sensitivity
from gemma_export.calibration.sensitivity import (
    Choice,
    SensitivityReport,
    UnitCost,
    best_selection,
    choose,
)
from gemma_export.errors import UsageError


def unit(name: str, kl: float, saved: int = 100, loss: float = 0.0) -> UnitCost:
    return UnitCost(name, "w8", 50, 50 + saved, kl, loss, 0.99)


UNITS = (
    unit("layers.0.self_attn.qkv_proj", 0.004, 300, 0.001),
    unit("layers.0.mlp.down_proj", 0.020, 500, 0.003),
    unit("layers.1.self_attn.qkv_proj", 0.001, 300, -0.002),
    unit("layers.1.mlp.down_proj", 0.005, 500, 0.0),
    unit("embed_tokens", 0.010, 900, 0.001),
)  # 0.040 in all


def everything(kl: float, loss: float = 0.0) -> UnitCost:
    return unit("everything", kl, sum(one.saved_bytes for one in UNITS), loss)


def most_saved(values: list[int], costs: list[tuple[float, ...]]) -> int:
    """The best sum of values, by trying every selection."""
    best = 0
    for taken in product((False, True), repeat=len(values)):
        rows = [cost for cost, one in zip(costs, taken, strict=True) if one]
        if all(sum(column) <= 1 for column in zip(*rows, strict=True)):
            best = max(best, sum(value for value, one in zip(values, taken, strict=True) if one))
    return best


@st.composite
def instances(draw: st.DrawFn) -> tuple[list[int], list[tuple[float, ...]]]:
    columns = draw(st.integers(1, 2))
    items = draw(st.integers(1, 9))
    values = draw(st.lists(st.integers(-2, 30), min_size=items, max_size=items))
    # Sixteenths add up without rounding, so that what just fits fits for both.
    cost = st.integers(0, 20).map(lambda sixteenths: sixteenths / 16)
    costs = draw(st.lists(st.tuples(*[cost] * columns), min_size=items, max_size=items))
    return values, costs


def check(values: list[int], costs: list[tuple[float, ...]], chosen: frozenset[int]) -> int:
    """That a selection is within the budget; what it saves."""
    for column in zip(*(costs[i] for i in chosen), strict=True):
        assert sum(column) <= 1
    return sum(values[i] for i in chosen)


@settings(max_examples=300, deadline=None)
@given(instances())
def test_the_selection_is_as_good_as_the_best_of_all(instance):
    values, costs = instance
    assert check(values, costs, best_selection(values, costs)) == most_saved(values, costs)


@settings(max_examples=100, deadline=None)
@given(instances())
def test_with_few_states_it_is_within_the_budget_and_no_worse_than_greedy(instance):
    values, costs = instance
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sensitivity, "MOST_STATES", 1)
        saved = check(values, costs, best_selection(values, costs))
    order = sorted(
        (i for i in range(len(values)) if values[i] > 0),
        key=lambda i: (sum(costs[i]) / values[i], -values[i]),
    )
    greedy, room = 0, [1.0] * len(costs[0])
    for i in order:
        if all(cost <= left for cost, left in zip(costs[i], room, strict=True)):
            room = [left - cost for left, cost in zip(room, costs[i], strict=True)]
            greedy += values[i]
    assert saved >= greedy


def test_greedy_by_cost_per_byte_is_not_enough():
    # The first item is the best bargain and fills the budget too far for the other two.
    values, costs = [60, 100, 120], [(0.2,), (0.4,), (0.6,)]
    assert best_selection(values, costs) == {1, 2}


def test_a_model_as_large_as_the_7b_is_solved_exactly():
    # Savings in the proportions of the 7B's layers; costs that no rule of thumb would sort.
    kinds, layers, table = (12, 4, 48, 24), 28, 768
    values = [table] + [kind for _ in range(layers) for kind in kinds]
    costs = [1 / 8] + [((i * 37 + 11) % 101 + 1) / 8192 for i in range(1, len(values))]
    saved = check(values, [(c,) for c in costs], best_selection(values, [(c,) for c in costs]))
    least = {0: 0.0}  # by bytes saved: the least cost
    for value, cost in zip(values, costs, strict=True):
        for total, before in sorted(least.items(), reverse=True):
            least[total + value] = min(least.get(total + value, math.inf), before + cost)
    assert saved == max(total for total, cost in least.items() if cost <= 1)


def test_nothing_is_kept_where_everything_is_within_the_budget():
    choice = choose(UNITS, 0.041, 1.0)
    assert choice.kept == ()
    assert choice.extra_bytes == 0
    assert choice.predicted_kl == pytest.approx(0.040)
    assert "nothing has to keep 16 bits" in choice.reason


def test_keeps_what_costs_the_fewest_bytes():
    # Without the two largest costs 0.010 is left, which is the budget; any other pair saves fewer bytes.
    choice = choose(UNITS, 0.010, None)
    assert set(choice.names) == {"layers.0.mlp.down_proj", "embed_tokens"}
    assert choice.names[0] == "layers.0.mlp.down_proj", "the most expensive comes first"
    assert choice.extra_bytes == 1400
    assert choice.predicted_kl == pytest.approx(0.010)
    assert choice.kl_before == pytest.approx(0.040)


def test_two_budgets_hold_at_once():
    assert choose(UNITS, 0.025, None).names == ("layers.0.mlp.down_proj",)
    both = choose(UNITS, 0.025, 0.15)
    assert both.names == ("layers.0.mlp.down_proj", "layers.0.self_attn.qkv_proj")
    assert both.predicted_kl == pytest.approx(0.016)
    assert both.predicted_perplexity_change == pytest.approx(math.expm1(0.001))


def test_a_gain_by_chance_pays_for_nothing():
    # With the gain the losses sum up to 0.003, which would be within the budget; without it to 0.005.
    choice = choose(UNITS, None, 0.41)
    assert choice.names == ("layers.0.self_attn.qkv_proj",)
    assert choice.predicted_perplexity_change == pytest.approx(math.expm1(0.004))


def test_costs_that_grow_together_are_scaled_up():
    # Together the units cost twice the sum, so that half the sum fills the budget.
    choice = choose(UNITS, 0.020, None, everything(0.080))
    assert choice.predicted_kl <= 0.020
    assert sum(one.kl for one in UNITS if one not in choice.kept) <= 0.010
    assert choice.kl_before == 0.080


def test_a_sum_above_what_everything_costs_is_not_scaled_down():
    choice = choose(UNITS, 0.019, None, everything(0.020))
    assert sum(one.kl for one in UNITS if one not in choice.kept) <= 0.019


def test_what_was_measured_counts_more_than_the_sum():
    assert choose(UNITS, 0.020, None, everything(0.019)).kept == ()
    assert choose(UNITS, None, 0.1, everything(1.0, loss=-0.5)).kept == ()


@pytest.mark.parametrize("broken", [math.nan, math.inf], ids=["NaN", "infinity"])
def test_a_unit_that_breaks_the_model_is_kept(broken):
    units = (*UNITS, unit("layers.2.mlp.down_proj", broken, 10_000, broken))
    choice = choose(units, 0.05, None, everything(broken))
    assert choice.names == ("layers.2.mlp.down_proj",)
    json.dumps(choice.to_json(), allow_nan=False)
    assert choice.kept[0].reason.startswith("quantized alone as w8 it has a KL of")


def test_it_says_why():
    assert choose(UNITS, 0.010, None).reason == (
        "Everything quantized has a KL of 0.04; the budget is a mean KL of 0.01. With 2 layers in 16 bits, "
        "1,400 bytes more, the rest is predicted to have a KL of 0.01."
    )
    reason = choose(UNITS, None, 0.21).reason
    assert "a perplexity change of +0.50%; the budget is a perplexity 0.21 % higher" in reason
    assert "1 layer in 16 bits" in reason


@pytest.mark.parametrize(
    ("kl", "perplexity"),
    [(-0.1, None), (math.nan, None), (math.inf, None), (None, -0.01), (None, math.nan)],
)
def test_refuses_what_is_no_budget(kl, perplexity):
    with pytest.raises(UsageError, match="is no budget"):
        choose(UNITS, kl, perplexity)


def test_refuses_a_budget_within_which_nothing_can_be_quantized():
    with pytest.raises(
        UsageError, match=r"layers\.1\.self_attn\.qkv_proj, which costs least, has a KL of 0\.001"
    ):
        choose(UNITS, 1e-6, None)


def test_needs_a_budget():
    with pytest.raises(ValueError, match="no budget"):
        choose(UNITS, None, None)


@given(st.floats(0.001, 0.05), st.floats(0.001, 0.05))
def test_a_larger_budget_never_makes_a_larger_bundle(a, b):
    small, large = (choose(UNITS, budget, None) for budget in sorted((a, b)))
    assert large.extra_bytes <= small.extra_bytes


def test_the_report_as_json():
    report = SensitivityReport(
        "gemma-2b", "int8", "cpu", "w8a16", "a text", 240, 8.5, UNITS, everything(math.nan)
    )
    data = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert data["sum_of_kl"] == pytest.approx(0.040)
    assert data["everything"]["kl"] is None
    assert data["units"][1] == {
        "name": "layers.0.mlp.down_proj",
        "form": "w8",
        "quantized_bytes": 50,
        "half_bytes": 550,
        "saved_bytes": 500,
        "kl": 0.020,
        "loss_change": 0.003,
        "perplexity_change": pytest.approx(math.expm1(0.003)),
        "top1_agreement": 0.99,
    }


def test_the_choice_as_json():
    choice = choose(UNITS, 0.010, None)
    data = json.loads(json.dumps(choice.to_json(), allow_nan=False))
    assert [one["name"] for one in data["kept"]] == list(choice.names)
    assert data["reason"] == choice.reason
    assert data["max_perplexity_increase"] is None
    assert isinstance(choice, Choice)
