"""What choosing a token of 256,000 costs, beside the same choice by sorting the vocabulary, in turns.

    python benchmarks/sampling.py

The sorted choice is the definition, written as one would: sort, cut after k, cumulate, cut at p, draw. The
logits are random numbers with a few large ones, as a model's are, and nearly flat ones, the worst case.
"""

import argparse
import statistics
import time
from collections.abc import Sequence

import numpy as np
from rich.console import Console
from rich.table import Table

from gemma_export.runtime.sampling import Logits, Sampler, SamplingOptions

VOCABULARY = 256_000
LIKELY = 50  # tokens that stand out

CASES = {
    "greedy": SamplingOptions(),
    "temperature": SamplingOptions(temperature=0.8, seed=0),
    "top-k 50": SamplingOptions(temperature=0.8, top_k=50, seed=0),
    "top-p 0.95": SamplingOptions(temperature=0.8, top_p=0.95, seed=0),
    "top-k 50, top-p 0.95": SamplingOptions(temperature=0.8, top_k=50, top_p=0.95, seed=0),
}


def steep() -> Logits:
    """Three standard deviations wide, and some that a model is sure of."""
    random = np.random.default_rng(0)
    logits = 3 * random.standard_normal(VOCABULARY)
    logits[random.integers(0, VOCABULARY, LIKELY)] += np.linspace(8, 14, LIKELY)
    return logits.astype(np.float32)


def flat() -> Logits:
    """One standard deviation wide: nearly all tokens make up 95 %."""
    return np.random.default_rng(0).standard_normal(VOCABULARY, np.float32)


class SortedSampler:
    """The definition of top-k and top-p."""

    def __init__(self, options: SamplingOptions) -> None:
        self._options = options
        self._random = np.random.default_rng(options.seed)

    def __call__(self, logits: Logits, history: Sequence[int]) -> int:
        """The next token; there is no repetition penalty."""
        options = self._options
        order = np.argsort(-logits, kind="stable")
        if options.temperature == 0:
            return int(order[0])
        scores = logits[order].astype(np.float64) / options.temperature
        if options.top_k:
            scores = scores[scores >= scores[options.top_k - 1]]
        weights = np.exp(scores - scores[0])
        ends = weights.cumsum() / weights.sum()
        kept = int(np.searchsorted(ends, options.top_p)) + 1
        number = self._random.random() * ends[:kept][-1]
        return int(order[np.searchsorted(ends[:kept], number, side="right")])


def main() -> None:
    """Prints milliseconds of both, and their ratio."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=20, help="choices of each, in turns")
    repeats = parser.parse_args().repeats
    table = Table("logits", "choice", "sorted, ms", "ms", "ratio")
    for name, logits in (("steep", steep()), ("flat", flat())):
        for case, options in CASES.items():
            seconds: dict[SortedSampler | Sampler, list[float]] = {
                SortedSampler(options): [],
                Sampler(options): [],
            }
            for _ in range(repeats):
                for choose, spent in seconds.items():
                    begun = time.perf_counter()
                    choose(logits, ())
                    spent.append(time.perf_counter() - begun)
            before, after = (statistics.median(spent) * 1e3 for spent in seconds.values())
            table.add_row(name, case, f"{before:.2f}", f"{after:.2f}", f"{before / after:.0f}")
    Console().print(table)


if __name__ == "__main__":
    main()
