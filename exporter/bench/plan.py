"""What is run: lengths that fit the bundle's cache, and the tokens that fill it."""

import os
from collections.abc import Iterable, Sequence
from itertools import chain, cycle, islice
from pathlib import Path
from typing import Literal

from gemma_export.calibration.passages import PASSAGES
from gemma_export.errors import UsageError
from gemma_export.exporter.bench.values import Plan
from gemma_export.runtime.options import GenerationOptions
from gemma_export.runtime.tokenizer import Tokenizer

Depth = int | Literal["full"]

PROMPTS = (128, 512, 2048)
DEPTHS: tuple[Depth, ...] = (0, 512, 2048, "full")
_CPUS = Path("/sys/devices/system/cpu")


def make_plan(
    max_length: int,
    *,
    prompts: Iterable[int] = PROMPTS,
    depths: Iterable[Depth] = DEPTHS,
    tokens: int = 32,
    threads: int | None = None,
) -> tuple[Plan, tuple[str, ...]]:
    """The plan for a cache, and a sentence on each length that does not fit into it.

    Args:
        max_length: Slots of a row of the cache.
        prompts: Lengths of prompts, at least 1.
        depths: Tokens before the decoded ones; `full` decodes into the last slot.
        tokens: How many are decoded.
        threads: None takes one per physical core.

    Raises:
        UsageError: A number is out of range, or nothing fits.
    """
    prompts, depths = list(prompts), list(depths)
    if tokens < 1 or (threads is not None and threads < 1):
        raise UsageError(f"There are {tokens} tokens on {threads} threads.", "Give at least 1 of each.")
    if any(length < 1 for length in prompts):
        raise UsageError("A prompt of no token cannot be run.", "Give lengths of at least 1.")
    full = max_length - tokens
    numbers = [full if depth == "full" else depth for depth in depths]
    left_out = [
        *(f"a prompt of {n:,}: the cache has {max_length:,} slots" for n in prompts if n > max_length),
        *(
            f"{tokens} tokens at depth {depth}: the cache has {max_length:,} slots"
            for n, depth in zip(numbers, depths, strict=True)
            if not 0 <= n <= full
        ),
    ]
    plan = Plan(
        tuple(sorted({n for n in prompts if n <= max_length})),
        tuple(sorted({n for n in numbers if 0 <= n <= full})),
        tokens,
        GenerationOptions().prefill_chunk,
        threads or physical_cores(),
    )
    if not plan.lengths:
        raise UsageError(
            f"Nothing of this fits into the bundle's context of {max_length:,}.",
            "Give shorter --prompts, smaller --depths or fewer --tokens.",
        )
    return plan, tuple(left_out)


def real_tokens(tokenizer: Tokenizer, count: int) -> list[int]:
    """The project's passages in a row, again and again: `count` ids, the first begins the sequence."""
    bodies: Sequence[Sequence[int]] = [tokenizer.encode_plain(text) for text in PASSAGES.values()]
    return list(islice(chain([tokenizer.bos], chain.from_iterable(cycle(bodies))), count))


def physical_cores() -> int:
    """Cores that this process may run on; hardware threads of one core count once."""
    cpus = os.sched_getaffinity(0)
    try:
        return len({_core(cpu) for cpu in cpus})
    except OSError:  # A kernel that does not tell.
        return len(cpus)


def _core(cpu: int) -> tuple[str, str]:
    topology = _CPUS / f"cpu{cpu}" / "topology"
    return (topology / "physical_package_id").read_text(), (topology / "core_id").read_text()
