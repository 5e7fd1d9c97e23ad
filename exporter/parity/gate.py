"""The parity gate: runs a bundle and the reference over the same tokens, and says how far apart they are.

1. The bundle continues some prompts greedily and keeps its logits.
2. The reference runs all texts, and the prompts with the bundle's continuations, in one pass over the layers.
   As long as its arg-max agrees with a continuation, the continuation is its own; where it does not is the
   first greedy divergence. (Verification as in speculative decoding, arXiv 2211.17192, with greedy choices.)
3. The bundle runs the texts teacher-forced, in prefill steps of varied sizes and then token by token; the
   logits it gives and the keys and values it keeps are compared as it goes.

In memory are the continuations' logits, and of the texts' at most a block of either side.
"""

import math
import time
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from typing import Protocol

from gemma_export.exporter import events
from gemma_export.exporter.parity.compare import CacheComparison, LogitsComparison, sampled_positions
from gemma_export.exporter.parity.continuation import Decode, verified
from gemma_export.exporter.parity.plan import make_plan
from gemma_export.exporter.parity.reference import Positions, ReferenceRun
from gemma_export.exporter.parity.report import (
    Continuation,
    Cost,
    LayerErrors,
    Level,
    MeasuredText,
    ParityReport,
)
from gemma_export.exporter.parity.run import BundleRunner, GateCache, GateSession, Progress
from gemma_export.runtime.parity import BUDGETS, Budget, verdict

__all__ = ["GateCache", "GateReference", "GateSession", "ParityReport", "check_parity", "sample_budget"]

_PACKAGES = ("gemma-export", "torch", "numpy", "onnxruntime", "onnxruntime-gpu", "transformers")


class GateReference(Protocol):
    """What the gate asks of a reference: `Reference` and `TransformersReference` are ones."""

    name: str

    def run(self, sequences: Sequence[Sequence[int]], *, keep_cache: bool | Positions) -> ReferenceRun:
        """Runs sequences, each alone and from position 0."""
        ...


def check_parity(
    session: GateSession,
    reference: GateReference,
    texts: Sequence[Sequence[int]],
    *,
    level: Level,
    precision: str,
    bos: int,
    stop: Collection[int] = (),
    names: Sequence[str] | None = None,
    decode: Decode | None = None,
    subject: str = "the bundle",
    budget: Budget | None = None,
    window: int | None = None,
    on_event: events.Listener = events.ignore,
) -> ParityReport:
    """Measures a bundle against its reference and judges it by its precision's budget.

    Args:
        session: The bundle, loaded.
        reference: What it should say.
        texts: Token ids of each text, beginning with `bos`; a quick check takes the first few.
        level: How much is measured: `quick` or `full`.
        precision: A key of `runtime.parity.BUDGETS`.
        bos: The beginning-of-sequence token.
        stop: Tokens that end a continuation.
        names: What to call each text in the report.
        decode: Makes text of tokens, so that the report can show it.
        subject: What is measured, for people.
        budget: What to judge by; None takes the precision's.
        window: Tokens that a local layer sees, or that its cache keeps where that rolls; None without
            such layers.
        on_event: Told how many tokens of all have been run, both sides counted.

    Returns:
        The report; a bundle outside its budget is a verdict in it, not an exception.

    Raises:
        ValueError: There is no text, or one does not begin with `bos`.
        ParityError: The bundle's vocabulary is not the reference's.
    """
    names = names if names is not None else [f"text {i + 1}" for i in range(len(texts))]
    plan = make_plan(level, texts, names, session.max_length, bos, window)
    bundle = BundleRunner(session, Progress(plan, on_event))
    drafts = [bundle.draft(draft, stop) for draft in plan.drafts]
    # The last token of a draft was chosen and never run.
    drafted = [run.prompt + draft.tokens[:-1] for run, draft in zip(plan.drafts, drafts, strict=True)]
    kept = [sampled_positions(len(text.tokens)) for text in plan.texts]

    begin = time.perf_counter()
    run = reference.run(
        [*(text.tokens for text in plan.texts), *drafted], keep_cache=[*kept, *([] for _ in drafts)]
    )
    reference_seconds = time.perf_counter() - begin
    bundle.progress.ran(sum(run.lengths))

    logits, cache = LogitsComparison(run), CacheComparison(run)
    first_draft = len(plan.texts)
    for i, draft in enumerate(drafts, start=first_draft):
        start = run.lengths[i] - len(draft.rows)
        for position, row in enumerate(draft.rows, start=start):
            # The next token is the bundle's own choice: as a target it would flatter the perplexity.
            logits.add(i, position, "continuation", -1, row)
    drafts.clear()
    measured = [bundle.run_text(i, text, logits, cache, kept[i]) for i, text in enumerate(plan.texts)]
    logits.flush()

    figures, layers = logits.figures(), cache.layers()
    budget = BUDGETS[precision] if budget is None else budget
    applied = sample_budget(budget, figures.tokens)
    # A cache is rounded to the bundle's precision once more, on top of what its input carries.
    cache_bound = 2 * budget.max_relative_error
    # Two logits may each move by what the budget allows one.
    tie = 2 * budget.max_relative_error * logits.largest_reference
    continuations = tuple(
        verified(prompt, logits.rows_of(i), tie, decode)
        for i, prompt in enumerate(plan.drafts, start=first_draft)
    )
    reasons = (
        *verdict(figures, applied),
        *_cache_reasons(layers, cache_bound),
        *_divergence_reasons(continuations),
    )
    return ParityReport(
        subject=subject,
        verdict="fail" if reasons else "pass",
        reasons=reasons,
        level=level,
        precision=precision,
        reference=reference.name,
        figures=figures,
        budget=applied,
        cache_bound=cache_bound,
        phases=logits.phases(),
        layers=layers,
        continuations=continuations,
        texts=tuple(
            MeasuredText(
                text.name, decode(text.tokens) if decode else None, len(text.tokens), count, text.chunks
            )
            for text, count in zip(plan.texts, measured, strict=True)
        ),
        max_length=session.max_length,
        logits=bundle.logits,
        cost=Cost(
            bundle.steps,
            bundle.tokens,
            bundle.seconds,
            sum(run.lengths),
            reference_seconds + logits.reference_seconds,
        ),
        versions=_versions(),
    )


def sample_budget(budget: Budget, tokens: int) -> Budget:
    """The budget for a sample: its top-1 bound is as low as chance may make it on this many tokens.

    The bound is on the model's agreement, and a few hundred tokens only estimate that. Allowed is the number
    of disagreements that a bundle exactly at the bound exceeds one time in a hundred, the number taken to
    be Poisson-distributed.
    """
    if not tokens:
        return budget
    expected = (1 - budget.top1_agreement) * tokens
    allowed, probability = 0, math.exp(-expected)
    cumulated = probability
    while cumulated < 0.99 and allowed < tokens:
        allowed += 1
        probability *= expected / allowed
        cumulated += probability
    return replace(budget, top1_agreement=1 - allowed / tokens)


def _cache_reasons(layers: Iterable[LayerErrors], bound: float) -> tuple[str, ...]:
    """One reason for keys and one for values; the first layer that is outside is where to look."""
    reasons = []
    for what in ("key", "value"):
        outside = [layer for layer in layers if not getattr(layer, f"{what}_max") <= bound]
        if outside:
            error = getattr(outside[0], f"{what}_max")
            more = f" (and those of {len(outside) - 1} later layers)" if len(outside) > 1 else ""
            reasons.append(
                f"the cached {what}s of layer {outside[0].layer}{more} are off by {error:.3g} "
                f"of the largest, above {bound:.3g}"
            )
    return tuple(reasons)


def _divergence_reasons(continuations: Iterable[Continuation]) -> tuple[str, ...]:
    return tuple(
        f"the continuation of {c.name!r} leaves the reference's at its token {c.divergence.index + 1} "
        f"by a margin of {c.divergence.margin:.3g}, which is no near tie"
        for c in continuations
        if c.divergence is not None and not c.divergence.near_tie
    )


def _versions() -> dict[str, str]:
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions
