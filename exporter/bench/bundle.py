"""A turn of a bundle: what `generate` does, with a clock beside it."""

from collections.abc import Callable, Sequence
from statistics import harmonic_mean
from time import perf_counter

from gemma_export.exporter.bench.plan import real_tokens
from gemma_export.exporter.bench.values import Plan, Timing, Turn
from gemma_export.runtime.kv_cache import KVCache
from gemma_export.runtime.sampling import Sampler, SamplingOptions
from gemma_export.runtime.session import Session
from gemma_export.runtime.text_stream import TextStream
from gemma_export.runtime.tokenizer import REPLACEMENT

Clock = Callable[[], float]
STRETCH = 4
"""Tokens that are decoded between two questions for the machine's rate."""


def run_turn(
    open_session: Callable[[], Session],
    plan: Plan,
    clock: Clock = perf_counter,
    read_rate: Callable[[], float] | None = None,
) -> Turn:
    """Loads a bundle and runs the plan once.

    The first token comes first, because it is waited for by who has just loaded; one chunk and one token that
    are not measured come before all that is measured afterwards.

    Args:
        open_session: Loads it.
        plan: What is run; it fits the cache.
        clock: Seconds.
        read_rate: Measures how many bytes per second are read from memory; None for a device, whose memory
            is another.
    """
    begin = clock()
    session = open_session()
    load = clock() - begin
    tokens = real_tokens(session.tokenizer, plan.slots + 1)
    first_token = _first_token(session, tokens[: plan.first_prompt], plan.chunk, clock)
    cache = session.new_cache()
    fill(session, cache, tokens, min(plan.chunk, max(plan.lengths)), plan.chunk)
    prefill, decode, choosing = [], [], 0.0
    for length in plan.lengths:
        begin = clock()
        if length in plan.prompts or length < cache.length:
            cache = session.new_cache()
        fill(session, cache, tokens, length, plan.chunk)
        if length in plan.prompts:
            prefill.append(Timing(length, length, clock() - begin))
        if length in plan.depths:
            timing, chosen = _decode(session, cache, tokens[length], plan.tokens, clock, read_rate)
            decode.append(timing)
            choosing += chosen
    return Turn(load, first_token, tuple(prefill), tuple(decode), choosing, peak=0)


def fill(session: Session, cache: KVCache, tokens: Sequence[int], length: int, chunk: int) -> None:
    """Fills a cache of one row up to `length` tokens, with those of `tokens` at the same positions."""
    chunk = min(chunk, cache.longest_step)
    for start in range(cache.length, length, chunk):
        session.step([list(tokens[start : min(start + chunk, length)])], cache)


def _first_token(session: Session, tokens: Sequence[int], chunk: int, clock: Clock) -> Timing:
    """A text of about so many tokens, from its characters to the first new token."""
    # The tokens may end within a character; what stands for its beginning would be more tokens again.
    text = session.tokenizer.decode(list(tokens[1:])).rstrip(REPLACEMENT) or " "
    begin = clock()
    generation = session.generate(text, max_new_tokens=1, stop_tokens=(), prefill_chunk=chunk)
    stats = generation.stats
    return Timing(0, stats.prefill_tokens, clock() - begin)


def _decode(
    session: Session,
    cache: KVCache,
    token: int,
    count: int,
    clock: Clock,
    read_rate: Callable[[], float] | None,
) -> tuple[Timing, float]:
    """Decodes behind what a cache holds, which it then holds too; also the seconds of choosing."""
    depth = cache.length
    session.step([[token]], cache)  # Buffers of the step's shape are set up.
    cache.truncate(depth)
    sampler, text = Sampler(SamplingOptions()), TextStream(session.tokenizer, ())
    rates = [] if read_rate is None else [read_rate()]
    seconds = choosing = 0.0
    for start in range(0, count, STRETCH):
        begin = clock()
        for _ in range(start, min(start + STRETCH, count)):
            logits = session.step([[token]], cache)
            ran = clock()
            token = sampler(logits[0, -1], ())
            text.push(token)
            choosing += clock() - ran
        seconds += clock() - begin
        if read_rate is not None:
            rates.append(read_rate())
    return Timing(depth, count, seconds, harmonic_mean(rates) if rates else None), choosing
