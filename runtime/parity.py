"""How far a bundle's logits are from its reference's: the numbers, the budgets and the verdict.

Pure numpy over blocks of logits, so that any gate can feed it. Symbols in shape comments: N tokens of a
block, V vocabulary.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gemma_export.errors import UsageError

Logits = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]
Doubles = npt.NDArray[np.float64]

_ROWS = 4  # rows at a time in float64: 8 MB per array at V = 256,000, near what a processor's cache holds


@dataclass(frozen=True)
class ParityFigures:
    """What was measured. Tokens with a NaN or infinite logit are counted and left out of all the rest.

    Attributes:
        tokens: Tokens compared.
        non_finite_reference: Tokens where the reference's logits are not all finite.
        non_finite_bundle: Likewise of the bundle.
        max_absolute_error: Largest |bundle - reference| of a logit.
        mean_absolute_error: Mean of the same over all logits.
        max_relative_error: `max_absolute_error` / largest |reference|.
        mean_kl: Mean over the tokens of KL(reference ‖ bundle), in nats.
        max_kl: Largest of the same.
        top1_agreement: Share of the tokens whose most likely next token is the same, 0 to 1.
        reference_perplexity: exp of the mean negative log-likelihood of the targets; None without targets.
        bundle_perplexity: Likewise of the bundle.
        positions: Positions that tokens were compared at, ascending; the curves below are in their order.
        kl_by_position: Mean KL at each position.
        error_by_position: Mean absolute error of the logits at each position.
        agreement_by_position: Top-1 agreement at each position.
    """

    tokens: int
    non_finite_reference: int
    non_finite_bundle: int
    max_absolute_error: float
    mean_absolute_error: float
    max_relative_error: float
    mean_kl: float
    max_kl: float
    top1_agreement: float
    reference_perplexity: float | None
    bundle_perplexity: float | None
    positions: tuple[int, ...]
    kl_by_position: tuple[float, ...]
    error_by_position: tuple[float, ...]
    agreement_by_position: tuple[float, ...]

    @property
    def perplexity_change(self) -> float | None:
        """The bundle's perplexity / the reference's - 1; None without targets."""
        if self.reference_perplexity is None or self.bundle_perplexity is None:
            return None
        return self.bundle_perplexity / self.reference_perplexity - 1

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values; JSON has no NaN and no infinity: they are null."""
        return {name: _finite(value) for name, value in asdict(self).items()}


@dataclass(frozen=True)
class Budget:
    """What a precision may cost. Every bound is inclusive; `top1_agreement` is the only lower one.

    The bounds are on rounding, not on quality: a bundle within them is the same model to a reader, and the
    mistakes they are there for (a wrong mask, activation, scale or position) exceed them by orders of
    magnitude.
    """

    max_relative_error: float
    mean_kl: float
    max_kl: float
    top1_agreement: float
    perplexity_change: float
    reason: str


BUDGETS: Mapping[str, Budget] = {
    "fp32": Budget(
        max_relative_error=1e-4,
        mean_kl=1e-6,
        max_kl=1e-4,
        top1_agreement=0.999,
        perplexity_change=1e-4,
        reason="Only the order of sums differs: 2^-24 per operation, some 1e-6 of the largest logit after "
        "18 to 28 layers. KL grows with the square of the error, so 1e-6 allows a logit error of 1e-3. One "
        "token in a thousand may be a tie.",
    ),
    "fp16": Budget(
        max_relative_error=5e-3,
        mean_kl=1e-4,
        max_kl=1e-2,
        top1_agreement=0.99,
        perplexity_change=2e-3,
        reason="11 significant bits: 2^-12 per rounding, ten to twenty times that after all layers. bfloat16 "
        "weights above 6e-5 are stored exactly, so most of it is arithmetic; stored in fp16 and computed in "
        "fp32 a bundle uses a fraction of this.",
    ),
    "bf16": Budget(
        max_relative_error=5e-2,
        mean_kl=5e-3,
        max_kl=5e-1,
        top1_agreement=0.96,
        perplexity_change=1e-2,
        reason="8 significant bits: 2^-9 per rounding, eight times fp16's error and so 64 times its KL. A "
        "bfloat16 checkpoint is stored exactly; the bound is for bfloat16 arithmetic and for rounding an "
        "fp32 checkpoint.",
    ),
    "int8": Budget(
        max_relative_error=1e-1,
        mean_kl=5e-3,
        max_kl=1.0,
        top1_agreement=0.96,
        perplexity_change=1e-2,
        reason="8-bit weights and, where products are integer, 8-bit activations: 2^-8 of a group's "
        "largest number per rounding, and that is several times a typical one. Like bfloat16 in the mean, "
        "with a longer tail: one rounded outlier moves a whole token.",
    ),
    "int4": Budget(
        max_relative_error=3e-1,
        mean_kl=5e-2,
        max_kl=3.0,
        top1_agreement=0.85,
        perplexity_change=1e-1,
        reason="16 levels per weight: 2^-4 of a group's largest, sixteen times int8's rounding. The bounds "
        "separate a quantized model from a broken one; what a checkpoint really pays is in the report, and "
        "--max-kl asks for less.",
    ),
}
"""The budget of each precision."""


class ParityAccumulator:
    """Sums up blocks of logits; its memory does not grow with the tokens, only with the positions."""

    def __init__(self) -> None:
        self._tokens = 0
        self._non_finite = np.zeros(2, np.int64)  # reference, bundle
        self._logits = 0
        self._error_sum = 0.0
        self._error_max = 0.0
        self._reference_max = 0.0
        self._kl_max = 0.0
        self._targets = 0
        self._losses = np.zeros(2)  # reference, bundle
        # Per position: tokens, KL, mean absolute error, agreement.
        self._curves = np.zeros((0, 4))

    def add(
        self, reference: Logits, bundle: Logits, targets: npt.ArrayLike | None, positions: npt.ArrayLike
    ) -> None:
        """Adds a block.

        Args:
            reference: float32 [N, V].
            bundle: float32 [N, V].
            targets: int [N], the token that follows each in the text; -1 where none is known; or None.
            positions: int [N], each token's position in its text.

        Raises:
            UsageError: The shapes differ, or a position or target is out of range.
        """
        places = np.asarray(positions, np.int64)
        wanted = np.full(len(places), -1, np.int64) if targets is None else np.asarray(targets, np.int64)
        _check_shapes(reference, bundle, wanted, places)
        grown = int(places.max(initial=-1)) + 1 - len(self._curves)
        if grown > 0:
            self._curves = np.concatenate([self._curves, np.zeros((grown, 4))])
        for start in range(0, len(places), _ROWS):
            rows = slice(start, start + _ROWS)
            self._add_rows(reference[rows], bundle[rows], wanted[rows], places[rows])

    def figures(self) -> ParityFigures:
        """What has been measured so far; of no tokens, every mean is NaN."""
        compared, kl, _, agreed = self._curves.sum(axis=0).tolist()
        (at,) = np.nonzero(self._curves[:, 0])
        curves = self._curves[at, 1:] / self._curves[at, :1]
        with np.errstate(over="ignore"):
            perplexities = np.exp(self._losses / self._targets).tolist() if self._targets else (None, None)
        return ParityFigures(
            tokens=self._tokens,
            non_finite_reference=int(self._non_finite[0]),
            non_finite_bundle=int(self._non_finite[1]),
            max_absolute_error=self._error_max if compared else float("nan"),
            mean_absolute_error=_mean(self._error_sum, self._logits),
            max_relative_error=_mean(self._error_max, self._reference_max),
            mean_kl=_mean(kl, compared),
            max_kl=self._kl_max if compared else float("nan"),
            top1_agreement=_mean(agreed, compared),
            reference_perplexity=perplexities[0],
            bundle_perplexity=perplexities[1],
            positions=tuple(at.tolist()),
            kl_by_position=tuple(curves[:, 0].tolist()),
            error_by_position=tuple(curves[:, 1].tolist()),
            agreement_by_position=tuple(curves[:, 2].tolist()),
        )

    def _add_rows(self, reference: Logits, bundle: Logits, targets: Ids, positions: Ids) -> None:
        finite = np.stack([np.isfinite(reference).all(axis=1), np.isfinite(bundle).all(axis=1)])
        self._tokens += len(positions)
        self._non_finite += (~finite).sum(axis=1)
        both = finite.all(axis=0)
        if not both.any():
            return
        a, b = reference[both].astype(np.float64), bundle[both].astype(np.float64)  # [n, V]
        targets, positions = targets[both], positions[both]
        log_total_a, probability = _softmax(a)
        log_total_b, _ = _softmax(b)
        difference = a - b
        # sum of p (log p - log q), where the logarithms' difference is that of the logits but for a constant
        # per row; not negative but for rounding.
        kl = np.einsum("nv,nv->n", probability, difference) - (log_total_a - log_total_b)
        kl = np.maximum(kl, 0)
        agreed = a.argmax(axis=1) == b.argmax(axis=1)
        error = np.abs(difference, out=difference)
        errors = error.mean(axis=1)
        self._logits += error.size
        self._error_sum += float(error.sum())
        self._error_max = max(self._error_max, float(error.max()))
        self._reference_max = max(self._reference_max, float(np.abs(a).max()))
        self._kl_max = max(self._kl_max, float(kl.max()))
        np.add.at(self._curves, positions, np.stack([np.ones_like(kl), kl, errors, agreed], axis=1))
        (known,) = np.nonzero(targets >= 0)
        self._targets += len(known)
        for whose, logits, log_total in ((0, a, log_total_a), (1, b, log_total_b)):
            self._losses[whose] += (log_total[known] - logits[known, targets[known]]).sum()


def verdict(figures: ParityFigures, budget: Budget) -> tuple[str, ...]:
    """Each bound of the budget that is violated, in words; none where the bundle passes.

    A NaN is a violation of whatever it stands for.
    """
    violations = []
    if not figures.tokens:
        violations.append("no token was compared")
    for whose, count in (
        ("the reference", figures.non_finite_reference),
        ("the bundle", figures.non_finite_bundle),
    ):
        if count:
            violations.append(f"{whose} gives NaN or infinite logits at {count} of {figures.tokens} tokens")
    upper = (
        ("largest relative error of a logit", figures.max_relative_error, budget.max_relative_error),
        ("mean KL divergence", figures.mean_kl, budget.mean_kl),
        ("largest KL divergence", figures.max_kl, budget.max_kl),
    )
    violations += [
        f"the {name} is {value:.3g}, above {bound:.3g}" for name, value, bound in upper if not value <= bound
    ]
    if not figures.top1_agreement >= budget.top1_agreement:
        violations.append(
            f"the top-1 agreement is {figures.top1_agreement:.3%}, below {budget.top1_agreement:.3%}"
        )
    change = figures.perplexity_change
    if change is not None and not abs(change) <= budget.perplexity_change:
        violations.append(
            f"the perplexity changes by {change:+.3%}, more than {budget.perplexity_change:.3%}"
        )
    return tuple(violations)


def _check_shapes(reference: Logits, bundle: Logits, targets: Ids, positions: Ids) -> None:
    if reference.ndim != 2 or not reference.shape == bundle.shape == (len(positions), reference.shape[1]):
        raise UsageError(
            f"The logits are {reference.shape} and {bundle.shape} for {len(positions)} positions.",
            "Give both as [N, V] with N positions.",
        )
    if targets.shape != positions.shape or positions.min(initial=0) < 0:
        raise UsageError(
            f"There are {targets.size} targets for {positions.size} positions, or one is negative.",
            "Give one target and one position per row, positions from 0.",
        )
    if targets.max(initial=-1) >= reference.shape[1]:
        raise UsageError(
            f"Target {targets.max()} is outside the vocabulary of {reference.shape[1]}.",
            "Were the ids made with another model's tokenizer?",
        )


def _softmax(logits: Doubles) -> tuple[Doubles, Doubles]:
    """Logarithm of the sum of exp(logits) [n], and the probabilities [n, V]."""
    largest = logits.max(axis=1, keepdims=True)
    weights = logits - largest
    np.exp(weights, out=weights)
    total = weights.sum(axis=1, keepdims=True)
    weights /= total
    return (largest + np.log(total))[:, 0], weights


def _mean(total: float, count: float) -> float:
    return total / count if count else float("nan")


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
