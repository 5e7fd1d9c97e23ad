"""What each quantized layer costs alone, and which layers keep 16 bits for a bundle to stay within a budget.

The costs of small independent errors add up: KL grows with the square of an error in the logits, and squares
of independent errors add. What this leaves out is measured: where everything quantized together costs more
than the sum, every cost is counted so much higher.

The smallest bundle is then a knapsack: quantize what saves the most bytes while its costs fit the budget.
"""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from typing import Any

from gemma_export.errors import UsageError
from gemma_export.graphs.formats import Form

MOST_STATES = 4000
"""Selections that the search goes on with. With one budget some dozen are needed, with two some thousand."""
FULL = 1 + 1e-9
"""What a budget holds, as a part of itself: a sum of a hundred costs may be rounded up past it."""


@dataclass(frozen=True)
class UnitCost:
    """What it costs to quantize one linear layer, or the embedding table, and nothing else.

    Attributes:
        name: The layer's, merged as the graph has it.
        form: How its product is computed.
        quantized_bytes: Codes and scales.
        half_bytes: The same weight in 16 bits.
        kl: Mean over the tokens of KL(reference ‖ quantized), in nats.
        loss_change: Mean change of the text's negative log-likelihood, in nats per token; a gain is negative.
        top1_agreement: Share of the tokens whose most likely next token stays the same, 0 to 1.
    """

    name: str
    form: Form
    quantized_bytes: int
    half_bytes: int
    kl: float
    loss_change: float
    top1_agreement: float

    @property
    def saved_bytes(self) -> int:
        """What quantizing it saves, and keeping it in 16 bits adds."""
        return self.half_bytes - self.quantized_bytes

    @property
    def perplexity_change(self) -> float:
        """Perplexity / the reference's - 1."""
        return _perplexity_change(self.loss_change)

    @property
    def reason(self) -> str:
        """Why it would keep 16 bits."""
        return (
            f"quantized alone as {self.form} it has a KL of {self.kl:.3g} and a perplexity change of "
            f"{self.perplexity_change:+.2%}, and saves {self.saved_bytes:,} bytes"
        )


@dataclass(frozen=True)
class SensitivityReport:
    """Each unit's cost alone, and that of all together.

    Attributes:
        model: Name of the model.
        precision: As it was asked for.
        target: Likewise.
        scheme: How the target keeps the precision.
        text: What was measured on, in words.
        tokens: Tokens whose next token was compared.
        reference_perplexity: Of the checkpoint in fp32.
        units: In the model's order.
        everything: All of them quantized together.
    """

    model: str
    precision: str
    target: str
    scheme: str
    text: str
    tokens: int
    reference_perplexity: float
    units: tuple[UnitCost, ...]
    everything: UnitCost

    @property
    def sum_of_kl(self) -> float:
        """What everything would cost if the costs only added up."""
        return sum(unit.kl for unit in self.units)

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values, and what follows from them; what is not finite is null."""
        return {
            "model": self.model,
            "precision": self.precision,
            "target": self.target,
            "scheme": self.scheme,
            "text": self.text,
            "tokens": self.tokens,
            "reference_perplexity": _finite(self.reference_perplexity),
            "sum_of_kl": _finite(self.sum_of_kl),
            "units": [_unit_json(unit) for unit in self.units],
            "everything": _unit_json(self.everything),
        }


@dataclass(frozen=True)
class Choice:
    """Which layers keep 16 bits, and why.

    Attributes:
        kept: The layers, the most expensive first.
        extra_bytes: What that adds to the bundle.
        max_kl: The budget; None where there is none.
        max_perplexity_increase: Likewise, in percent.
        kl_before: Mean KL with everything quantized.
        perplexity_change_before: Change of the perplexity with everything quantized.
        predicted_kl: Mean KL of what stays quantized, predicted.
        predicted_perplexity_change: Change of the perplexity with what stays quantized, predicted.
    """

    kept: tuple[UnitCost, ...]
    extra_bytes: int
    max_kl: float | None
    max_perplexity_increase: float | None
    kl_before: float
    perplexity_change_before: float
    predicted_kl: float
    predicted_perplexity_change: float

    @property
    def names(self) -> tuple[str, ...]:
        """The layers' names."""
        return tuple(unit.name for unit in self.kept)

    @property
    def reason(self) -> str:
        """Why, in a sentence."""
        budgets, before, after = [], [], []
        if self.max_kl is not None:
            budgets.append(f"a mean KL of {self.max_kl:.4g}")
            before.append(f"a KL of {self.kl_before:.4g}")
            after.append(f"a KL of {self.predicted_kl:.4g}")
        if self.max_perplexity_increase is not None:
            budgets.append(f"a perplexity {self.max_perplexity_increase:.4g} % higher")
            before.append(f"a perplexity change of {self.perplexity_change_before:+.2%}")
            after.append(f"a perplexity change of {self.predicted_perplexity_change:+.2%}")
        everything = f"Everything quantized has {' and '.join(before)}"
        budget = f"the budget is {' and '.join(budgets)}"
        if not self.kept:
            return f"{everything}; {budget}: nothing has to keep 16 bits."
        layers = "1 layer" if len(self.kept) == 1 else f"{len(self.kept)} layers"
        return (
            f"{everything}; {budget}. With {layers} in 16 bits, {self.extra_bytes:,} bytes more, the rest is "
            f"predicted to have {' and '.join(after)}."
        )

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values; what is not finite is null."""
        fields = {name: _finite(value) for name, value in asdict(self).items() if name != "kept"}
        return {"kept": [_unit_json(unit) for unit in self.kept], **fields, "reason": self.reason}


def choose(
    units: Sequence[UnitCost],
    max_kl: float | None,
    max_perplexity_increase: float | None,
    everything: UnitCost | None = None,
    share: float = 1.0,
) -> Choice:
    """The layers to keep in 16 bits for the smallest bundle that is predicted to be within the budget.

    A unit that makes the text likelier by chance counts as free, not as credit for another.

    The selection is the smallest there is as long as no step of the search has more than `MOST_STATES`
    selections worth going on with; beyond that it is at least as small as that of a greedy choice by cost
    per byte.

    Args:
        units: What every unit costs alone.
        max_kl: The most that the mean KL may be; None for no bound.
        max_perplexity_increase: The most that the perplexity may grow, in percent; None for no bound.
        everything: What all of them cost together; None predicts it by the sum.
        share: Of a budget, that may be used up: other texts cost a little more or less than those measured.

    Raises:
        UsageError: A budget is no number of at least 0, or nothing could be quantized within it.
        ValueError: Neither budget was given.
    """
    _check_budget("--max-kl", max_kl)
    _check_budget("--max-perplexity-increase", max_perplexity_increase)
    if max_kl is None and max_perplexity_increase is None:
        raise ValueError("no budget was given")
    kl = [_cost(unit.kl) for unit in units]
    loss = [_cost(unit.loss_change) for unit in units]
    kl_before, loss_before = sum(kl), sum(loss)
    if everything is not None:
        kl_before, loss_before = _cost(everything.kl), everything.loss_change
        kl = _summing_to(kl, max(kl_before, sum(kl)))
        # Most of a gain or a loss of a single unit is chance, and of all together much of it cancels.
        loss = _summing_to(loss, _cost(loss_before))
    # A budget that everything quantized keeps asks for nothing, whatever the sum says.
    exceeded = []
    if max_kl is not None and kl_before > share * max_kl:
        exceeded.append([_share(cost, share * max_kl) for cost in kl])
    if max_perplexity_increase is not None:
        allowed = share * math.log1p(max_perplexity_increase / 100)
        if _cost(loss_before) > allowed:
            exceeded.append([_share(cost, allowed) for cost in loss])
    quantized = frozenset(range(len(units)))
    if exceeded:
        quantized = best_selection([unit.saved_bytes for unit in units], list(zip(*exceeded, strict=True)))
        if not quantized:
            raise _nothing_fits(units, max_kl, max_perplexity_increase)
    kept = [unit for i, unit in enumerate(units) if i not in quantized]
    return Choice(
        kept=tuple(sorted(kept, key=lambda unit: -_cost(unit.kl))),
        extra_bytes=sum(unit.saved_bytes for unit in kept),
        max_kl=max_kl,
        max_perplexity_increase=max_perplexity_increase,
        kl_before=kl_before,
        perplexity_change_before=_perplexity_change(loss_before),
        predicted_kl=sum(kl[i] for i in quantized) if kept else kl_before,
        predicted_perplexity_change=_perplexity_change(
            sum(loss[i] for i in quantized) if kept else loss_before
        ),
    )


@dataclass(frozen=True)
class _State:
    """A selection among the items that were looked at: what it saves, what it costs, and which (as bits)."""

    saved: int
    costs: tuple[float, ...]
    chosen: int

    def with_item(self, step: int, value: int, costs: tuple[float, ...]) -> "_State":
        """The selection with one item more, that of a step."""
        total = tuple(a + b for a, b in zip(self.costs, costs, strict=True))
        return _State(self.saved + value, total, self.chosen | 1 << step)

    @property
    def fits(self) -> bool:
        """Whether it is within the budget."""
        return all(cost <= FULL for cost in self.costs)


def best_selection(values: Sequence[int], costs: Sequence[tuple[float, ...]]) -> frozenset[int]:
    """The items with the largest sum of values whose costs sum up to at most 1 in every column.

    Items are taken or left one after the other. Of two selections the one that saves no more and costs no
    less in any column is dropped (Nemhauser and Ullmann 1969), and so is one that cannot beat the greedy
    selection even if the rest could be taken in part. Layers of one kind save the same, so few remain.

    Args:
        values: What taking an item is worth; one worth nothing is never taken.
        costs: For each item a cost of at least 0 per column; all have as many columns.

    Returns:
        Indices of the items to take; of equally good selections one that costs little.
    """
    # What costs least for its worth comes first: so the greedy selection is good, and the bounds are tight.
    order = sorted(
        (i for i in range(len(values)) if values[i] > 0 and all(cost <= FULL for cost in costs[i])),
        key=lambda i: (sum(costs[i]) / values[i], -values[i]),
    )
    if not order:
        return frozenset()
    bound = _Bound([values[i] for i in order], [sum(costs[i]) for i in order], len(costs[0]))
    best = _greedy([values[i] for i in order], [costs[i] for i in order])
    states = [_State(0, (0.0,) * len(costs[0]), 0)]
    for step, item in enumerate(order):
        taken = [state.with_item(step, values[item], costs[item]) for state in states]
        states = _undominated([*states, *(state for state in taken if state.fits)])
        states = [state for state in states if bound(state, step + 1) >= best.saved]
        if len(states) > MOST_STATES:
            states = sorted(states, key=lambda state: -bound(state, step + 1))[:MOST_STATES]
        best = min([best, *states], key=lambda state: (-state.saved, sum(state.costs)))
    return frozenset(item for step, item in enumerate(order) if best.chosen >> step & 1)


class _Bound:
    """The most that a selection can still become.

    It is what it could save if its costs were added up over the columns, and if the next items in order could
    be taken in part.
    """

    def __init__(self, values: Sequence[int], costs: Sequence[float], columns: int) -> None:
        self._values, self._costs, self._columns = values, costs, columns
        self._value_sums = [0, *accumulate(values)]
        self._cost_sums = [0.0, *accumulate(costs)]
        # Every sum of values is a multiple of this, and so is the best one.
        self._unit = math.gcd(*values)

    def __call__(self, state: _State, start: int) -> int:
        """Of a state that has the items from `start` on before it."""
        room = self._columns * FULL - sum(state.costs) + self._cost_sums[start]
        end = bisect_right(self._cost_sums, room) - 1
        value = state.saved + self._value_sums[end] - self._value_sums[start]
        if end == len(self._values):
            return value
        part = min(1.0, max(0.0, (room - self._cost_sums[end]) / self._costs[end]))
        return (value + math.ceil(part * self._values[end])) // self._unit * self._unit


def _greedy(values: Sequence[int], costs: Sequence[tuple[float, ...]]) -> _State:
    """Takes whatever still fits, in order."""
    state = _State(0, (0.0,) * len(costs[0]), 0)
    for step, (value, cost) in enumerate(zip(values, costs, strict=True)):
        more = state.with_item(step, value, cost)
        state = more if more.fits else state
    return state


def _undominated(states: list[_State]) -> list[_State]:
    """Those that no other matches in what is saved and undercuts in what it costs.

    In the order of falling savings a state is worth keeping if no earlier one costs as little in both
    columns. The earlier ones are held as a staircase, ascending in the first column, falling in the second.
    """
    states.sort(key=lambda state: (-state.saved, state.costs))
    kept: list[_State] = []
    first: list[float] = []
    second: list[float] = []
    for state in states:
        a, b = state.costs[0], state.costs[-1]
        at = bisect_right(first, a)
        if at and second[at - 1] <= b:
            continue
        kept.append(state)
        at = bisect_left(first, a)
        end = at
        while end < len(second) and second[end] >= b:
            end += 1
        first[at:end], second[at:end] = [a], [b]
    return kept


def _cost(value: float) -> float:
    """A cost to reckon with: a gain is none, and what is no number is without bound."""
    return math.inf if math.isnan(value) else max(0.0, value)


def _summing_to(costs: Sequence[float], total: float) -> list[float]:
    """Costs scaled so that they sum up to a total; as they are where no factor does that."""
    now = sum(costs)
    if not (0 < now < math.inf and total < math.inf):
        return list(costs)
    return [cost * total / now for cost in costs]


def _share(cost: float, budget: float) -> float:
    """A cost as a part of the budget."""
    if cost == 0:
        return 0.0
    return math.inf if budget == 0 else cost / budget


def _perplexity_change(loss_change: float) -> float:
    return math.expm1(loss_change) if loss_change < 700 else math.inf  # e^709 is the largest double.


def _check_budget(option: str, budget: float | None) -> None:
    if budget is not None and not 0 <= budget < math.inf:
        raise UsageError(f"{option} {budget} is no budget.", "Give a number of at least 0, as in 0.02.")


def _nothing_fits(
    units: Sequence[UnitCost], max_kl: float | None, max_perplexity_increase: float | None
) -> UsageError:
    asked = [f"--max-kl {max_kl:g}"] if max_kl is not None else []
    if max_perplexity_increase is not None:
        asked.append(f"--max-perplexity-increase {max_perplexity_increase:g}")
    least = min(units, key=lambda unit: _cost(unit.kl))
    return UsageError(
        f"No layer can be quantized within {' and '.join(asked)}: {least.name}, which costs least, has a KL "
        f"of {least.kl:.3g} and changes the perplexity by {least.perplexity_change:+.3%}.",
        "Give a larger budget, or build with --precision fp16.",
    )


def _unit_json(unit: UnitCost) -> dict[str, Any]:
    fields = {**asdict(unit), "saved_bytes": unit.saved_bytes, "perplexity_change": unit.perplexity_change}
    return {name: _finite(value) for name, value in fields.items()}


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
