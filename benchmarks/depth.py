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
from statistics import harmonic_mean, median, quantiles
from time import perf_counter

from rich.console import Console
from rich.table import Table

from gemma_export.exporter.bench.bundle import STRETCH, fill
from gemma_export.exporter.bench.limits import bytes_per_token
from gemma_export.exporter.bench.plan import physical_cores, real_tokens
from gemma_export.exporter.bench.reading import Reading
from gemma_export.runtime.kv_cache import KVCache
from gemma_export.runtime.options import GenerationOptions
from gemma_export.runtime.session import Session, load


@dataclass
class Depth:
    """A cache that holds so many tokens, and what its stretches took.

    Attributes:
        tokens: How many the cache holds before each stretch.
        cache: Of one row.
        seconds: Of each stretch, per token.
        limits: Of each stretch, the seconds in which a token's bytes were read then.
    """

    tokens: int
    cache: KVCache
    seconds: list[float] = field(default_factory=list)
    limits: list[float] = field(default_factory=list)

    def run(self, session: Session, token: int) -> float:
        """Runs a stretch and forgets it again; returns seconds per token."""
        begin = perf_counter()
        for _ in range(STRETCH):
            session.step([[token]], self.cache)
        seconds = (perf_counter() - begin) / STRETCH
        self.cache.truncate(self.tokens)
        return seconds


def measure(session: Session, lengths: list[int], stretches: int, threads: int) -> list[Depth]:
    """Runs so many stretches at each depth, in turns."""
    ids = real_tokens(session.tokenizer, max(lengths) + 1)
    depths = [Depth(length, session.new_cache()) for length in lengths]
    for depth in depths:
        fill(session, depth.cache, ids, depth.tokens, GenerationOptions().prefill_chunk)
        depth.run(session, ids[depth.tokens])
    with Reading(threads) as reading:
        before = reading.rate()
        for _ in range(stretches):
            for depth in depths:
                depth.seconds.append(depth.run(session, ids[depth.tokens]))
                after = reading.rate()
                middle = depth.tokens + (STRETCH + 1) / 2
                bytes_read = bytes_per_token(session.manifest, middle)
                depth.limits.append(bytes_read / harmonic_mean([before, after]))
                before = after
    return depths


def main() -> None:
    """Measures what the arguments name."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--depths", default="32,2047", help="separated by commas; the first is compared with")
    parser.add_argument("--stretches", type=int, default=60, help="of four tokens, at each depth")
    arguments = parser.parse_args()
    threads = physical_cores()
    session = load(arguments.bundle, threads=threads)
    lengths = [int(length) for length in arguments.depths.split(",")]
    depths = measure(session, lengths, arguments.stretches, threads)
    table = Table("depth", "tok/s", "of the limit (quartiles)", f"beside depth {lengths[0]:,}")
    for depth in depths:
        shares = [limit / took for limit, took in zip(depth.limits, depth.seconds, strict=True)]
        low, middle, high = quantiles(shares)
        ratio = median(first / took for first, took in zip(depths[0].seconds, depth.seconds, strict=True))
        table.add_row(
            f"{depth.tokens:,}",
            f"{1 / median(depth.seconds):.1f}",
            f"{middle:.0%} ({low:.0%}, {high:.0%})",
            f"{ratio:.3f}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
