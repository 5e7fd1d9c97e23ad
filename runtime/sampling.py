"""Choosing the next token from its logits: greedy, or sampled, with Hugging Face's semantics.

Order: repetition penalty, temperature, top-k, top-p. Pure functions of float32 logits [V]; nothing here
sorts a whole vocabulary, which at 256,000 tokens would cost more than the rest of the choice.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gemma_export.errors import GemmaExportError, UsageError

Logits = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]
Probabilities = npt.NDArray[np.float64]


@dataclass(frozen=True)
class SamplingOptions:
    """How the next token is chosen.

    Attributes:
        temperature: 0 takes the most likely token (the lowest id among equals); above 0 the logits are
            divided by it and a token is drawn.
        top_k: Draw among the `top_k` most likely tokens, and those as likely as the last of them; 0: all.
        top_p: Draw among the fewest most likely tokens whose probabilities reach `top_p`; 1: all.
        repetition_penalty: Divides the positive logits, and multiplies the negative ones, of every token
            of the prompt and the text so far; 1: off.
        seed: Seeds the draws; None takes fresh entropy.

    Raises:
        UsageError: A value is out of range; the message names it.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UsageError(f"temperature is {self.temperature}.", "Use 0 for greedy, or a number above 0.")
        if self.top_k < 0:
            raise UsageError(f"top_k is {self.top_k}.", "Use 0 for all tokens, or a whole number above 0.")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top_p is {self.top_p}.", "Use a number above 0, up to 1 for all tokens.")
        if not (math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0):
            raise UsageError(
                f"repetition_penalty is {self.repetition_penalty}.", "Use 1 for none, or a number above 0."
            )
        if self.seed is not None and self.seed < 0:
            raise UsageError(f"seed is {self.seed}.", "Use a whole number that is not negative.")


class Sampler:
    """Draws the tokens of one sequence: the options and the state of their random generator."""

    def __init__(self, options: SamplingOptions) -> None:
        self._options = options
        self._random = np.random.default_rng(options.seed)

    def __call__(self, logits: Logits, history: Sequence[int]) -> int:
        """The next token.

        Args:
            logits: float32 [V]; not changed.
            history: The ids of the prompt and of the text so far.

        Raises:
            GemmaExportError: A logit is not a finite number.
        """
        options = self._options
        if options.repetition_penalty != 1:
            logits = penalize(logits, history, options.repetition_penalty)
        if options.temperature == 0:
            return greedy(logits)
        ids, probabilities = distribution(logits, options)
        return int(ids[draw(probabilities, self._random.random())])


def greedy(logits: Logits) -> int:
    """The id of the largest of the logits [V]; the lowest such id among equals.

    Raises:
        GemmaExportError: A logit is not a finite number.
    """
    best = int(logits.argmax())  # the first of the largest, or the first NaN
    _check_number(logits[best])
    return best


def penalize(logits: Logits, history: Sequence[int], penalty: float) -> Logits:
    """A copy of the logits [V] with the tokens of `history` made less likely (more, below 1), once each."""
    seen = np.unique(np.asarray(history, np.int64))
    penalized = logits.copy()
    score = penalized[seen]
    penalized[seen] = np.where(score < 0, score * np.float32(penalty), score / np.float32(penalty))
    return penalized


def distribution(logits: Logits, options: SamplingOptions) -> tuple[Ids, Probabilities]:
    """The tokens that may be drawn and their probabilities.

    Args:
        logits: float32 [V], after any penalty.
        options: A temperature above 0, and the cuts.

    Returns:
        ids: int64 [N] in no particular order, and probabilities: float64 [N] that sum to 1.

    Raises:
        GemmaExportError: A logit is not a finite number.
    """
    largest = logits.max()
    _check_number(largest)
    ids = _largest(logits, options.top_k or len(logits))
    weights = np.exp((logits[ids].astype(np.float64) - largest) / options.temperature)
    probabilities = weights / weights.sum()
    if options.top_p < 1:
        kept = _nucleus(probabilities, options.top_p)
        ids, probabilities = ids[kept], probabilities[kept]
        probabilities = probabilities / probabilities.sum()
    return ids, probabilities


def draw(probabilities: Probabilities, uniform: float) -> int:
    """The index that a uniform number in [0, 1) falls on, by the cumulated probabilities."""
    cumulated = probabilities.cumsum()
    # Scaled by what the sum came to, so that rounding leaves no gap behind the last one.
    return int(np.searchsorted(cumulated, uniform * cumulated[-1], side="right"))


def _largest(scores: npt.NDArray[Any], count: int) -> Ids:
    """The indices of the `count` largest scores and of all equal to the smallest of them, ascending."""
    if count >= len(scores):
        return np.arange(len(scores))
    threshold = np.partition(scores, -count)[-count]
    return np.flatnonzero(scores >= threshold)


def _nucleus(probabilities: Probabilities, top_p: float) -> Ids:
    """Indices of the fewest largest probabilities that sum to `top_p`, the lower index first among equals.

    A nucleus is mostly small: look among the 64 largest first, and among eight times as many until they
    hold it.
    """
    count = 64
    while True:
        candidates = _largest(probabilities, count)
        order = candidates[np.argsort(-probabilities[candidates], kind="stable")]
        mass = probabilities[order].cumsum()
        if mass[-1] >= top_p or len(order) == len(probabilities):
            # A token is in as long as what came before it does not reach top_p.
            return order[: int(np.searchsorted(mass, top_p, side="left")) + 1]
        count *= 8


def _check_number(largest: np.floating[Any]) -> None:
    # max and argmax pass a NaN on, so the largest stands for all.
    if not np.isfinite(largest):
        raise GemmaExportError(
            f"The model's largest logit is {largest}.",
            "The bundle computes beyond its precision's range: run `gemma-export parity` on it, and build it "
            "in another precision.",
        )
