"""What the tokens in a cache cost the next one: decoding at several depths, in turns in one process.

    python benchmarks/depth.py bundles/gemma-2b-int8-cpu
    python benchmarks/depth.py BUNDLE --depths 32,512,2047 --stretches 40

A stretch is four tokens at one depth, and how fast memory is read is asked before and after it. So each depth
is held against the others, and against its own limit, at what the machine does in the same seconds. Wanted is
that decoding behind 2,047 tokens has at least 0.9 of the speed behind 32.
"""

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from statistics import harmonic_mean, median
from time import perf_counter

import numpy as np
from rich.console import Console
from rich.table import Table

from gemma_export.exporter.bench.bundle import STRETCH, fill
from gemma_export.exporter.bench.limits import decode_seconds
from gemma_export.exporter.bench.plan import make_plan, physical_cores, real_tokens
from gemma_export.exporter.bench.reading import Reading
from gemma_export.exporter.bench.values import Plan, Timing
from gemma_export.runtime.kv_cache import KVCache
from gemma_export.runtime.session import Session, load


@dataclass
class Depth:
    """A cache that holds so many tokens, and what its stretches took.

    Attributes:
        tokens: How many the cache holds before each stretch.
        cache: Of one row.
        seconds: Of each stretch.
        shares: Of each stretch, the part of its time in which its bytes could have been read.
    """

    tokens: int
    cache: KVCache
    seconds: list[float] = field(default_factory=list)
    shares: list[float] = field(default_factory=list)

    def run(self, session: Session, token: int) -> float:
        """Runs a stretch and forgets it again; returns its seconds."""
        begin = perf_counter()
        for _ in range(STRETCH):
            session.step([[token]], self.cache)
        seconds = perf_counter() - begin
        self.cache.truncate(self.tokens)
        return seconds


def measure(session: Session, plan: Plan, stretches: int) -> list[Depth]:
    """Runs so many stretches at each depth, in turns."""
    ids = real_tokens(session.tokenizer, plan.slots)
    depths = [Depth(tokens, session.new_cache()) for tokens in plan.depths]
    for depth in depths:
        fill(session, depth.cache, ids, depth.tokens, plan.chunk)
        depth.run(session, ids[depth.tokens])
    with Reading(plan.threads) as reading:
        before = reading.rate()
        for _ in range(stretches):
            for depth in depths:
                seconds, after = depth.run(session, ids[depth.tokens]), reading.rate()
                timing, rate = Timing(depth.tokens, STRETCH, seconds), harmonic_mean([before, after])
                depth.seconds.append(seconds)
                depth.shares.append(decode_seconds(session.manifest, timing, rate) / seconds)
                before = after
    return depths


def main() -> None:
    """Measures what the arguments name."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--depths", default="32,2047", help="with commas; the least is compared with")
    parser.add_argument("--stretches", type=int, default=60, help="of four tokens, at each depth")
    arguments = parser.parse_args()
    session = load(arguments.bundle, threads=physical_cores())
    wanted = [int(depth) for depth in arguments.depths.split(",")]
    plan, left_out = make_plan(session.max_length, prompts=(), depths=wanted, tokens=STRETCH)
    first, *_ = depths = measure(session, plan, arguments.stretches)
    table = Table("depth", "tok/s", "of the limit (quartiles)", f"beside depth {first.tokens:,}")
    for depth in depths:
        low, middle, high = np.quantile(depth.shares, (0.25, 0.5, 0.75))
        ratio = median(least / took for least, took in zip(first.seconds, depth.seconds, strict=True))
        table.add_row(
            f"{depth.tokens:,}",
            f"{STRETCH / median(depth.seconds):.1f}",
            f"{middle:.0%} ({low:.0%}, {high:.0%})",
            f"{ratio:.3f}",
        )
    console = Console()
    console.print(table)
    for what in left_out:
        console.print(f"left out: {what}")


if __name__ == "__main__":
    main()
