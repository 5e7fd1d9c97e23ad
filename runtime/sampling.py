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

_BLOCK = 512


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
        ids, weights = _weights(logits, options)
        index = draw(weights, self._random.random())
        return index if ids is None else int(ids[index])


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
    seen = np.asarray(history, np.int64)  # What is there twice is given the same score twice.
    penalized = logits.copy()
    score = logits[seen]
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
    ids, weights = _weights(logits, options)
    return np.arange(len(logits)) if ids is None else ids, weights / weights.sum()


def draw(weights: Probabilities, uniform: float) -> int:
    """The index that a uniform number in [0, 1) falls on: in blocks first, then in one of them."""
    sums = np.add.reduceat(weights, np.arange(0, len(weights), _BLOCK))
    block, rest = _fall(sums, uniform * sums.sum())
    start = block * _BLOCK
    return start + _fall(weights[start : start + _BLOCK], rest)[0]


def _weights(logits: Logits, options: SamplingOptions) -> tuple[Ids | None, Probabilities]:
    """The tokens that may be drawn (None: all) and what their probabilities are multiples of.

    Over a whole vocabulary it writes in place: fresh memory would cost more than the arithmetic.
    """
    largest = logits.max()
    _check_number(largest)
    ids: Ids | None = None
    if 0 < options.top_k < len(logits):
        ids = np.flatnonzero(logits >= np.partition(logits, -options.top_k)[-options.top_k])
        logits = logits[ids]
    weights = logits.astype(np.float64)
    weights -= largest
    weights /= options.temperature
    np.exp(weights, out=weights)
    if options.top_p < 1:
        kept = _nucleus(weights, options.top_p)
        ids, weights = kept if ids is None else ids[kept], weights[kept]
    return ids, weights


def _fall(parts: Probabilities, number: float) -> tuple[int, float]:
    """The part that a number between 0 and their sum falls into, and how far; one of size 0 is never hit."""
    ends = parts.cumsum()
    # Of what rounding leaves behind the last end, the last part takes care.
    part = min(int(np.searchsorted(ends, number, side="right")), int(np.flatnonzero(parts)[-1]))
    return part, number - (ends[part] - parts[part])


def _nucleus(weights: Probabilities, top_p: float) -> Ids:
    """Indices of the fewest largest weights that make up `top_p` of all, the lower index first among equals.

    A nucleus is mostly small: look among the 64 largest first, and among eight times as many until they
    hold it. Only numbers are sorted; indices follow from the smallest that is in.
    """
    total = weights.sum()
    # What is smaller than this makes up less than the rest, all of it together (half: for the rounding).
    numbers = weights[weights > (1 - top_p) * total / len(weights) / 2]
    count = 64
    while True:
        count = min(count, len(numbers))
        numbers.partition(len(numbers) - count)
        largest = numbers[-count:]
        largest.sort()
        sums = largest[::-1].cumsum()
        if sums[-1] >= top_p * total or count == len(numbers):
            break
        count *= 8
    # A token is in as long as what came before it does not reach the sum.
    size = min(int(np.searchsorted(sums, top_p * total, side="left")) + 1, count)
    smallest = largest[-size]
    above = np.flatnonzero(weights > smallest)
    equal = np.flatnonzero(weights == smallest)[: size - len(above)]
    return np.concatenate((above, equal))


def _check_number(largest: np.floating[Any]) -> None:
    # max and argmax pass a NaN on, so the largest stands for all.
    if not np.isfinite(largest):
        raise GemmaExportError(
            f"The model's largest logit is {largest}.",
            "The bundle computes beyond its precision's range: run `gemma-export parity` on it, and build it "
            "in another precision.",
        )
