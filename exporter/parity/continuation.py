"""Greedy continuations of the parity gate: where the reference disagrees with the bundle, if it does."""

from collections.abc import Callable, Sequence

from gemma_export.exporter.parity.compare import ComparedRow
from gemma_export.exporter.parity.plan import DraftRun
from gemma_export.exporter.parity.report import Continuation, ContinuationText, Divergence

Decode = Callable[[Sequence[int]], str]


def verified(draft: DraftRun, rows: Sequence[ComparedRow], tie: float, decode: Decode | None) -> Continuation:
    """A continuation with its first divergence, if it has one.

    Args:
        draft: The prompt.
        rows: What was found at each position that chose a token.
        tie: The margin up to which a divergence is a near tie.
        decode: Makes text of tokens.
    """
    start = len(draft.prompt) - 1
    tokens = tuple(row.bundle_token for row in rows)
    parted = next((k for k, row in enumerate(rows) if row.reference_token != row.bundle_token), None)
    divergence = None
    if parted is not None:
        row = rows[parted]
        divergence = Divergence(
            index=parted,
            position=start + parted,
            bundle_token=row.bundle_token,
            reference_token=row.reference_token,
            margin=row.margin,
            error=row.error,
            near_tie=row.margin <= tie,
        )
    text = _continuation_text(draft.prompt, tokens, divergence, decode) if decode else None
    return Continuation(draft.name, draft.prompt, tokens, divergence, text)


def _continuation_text(
    prompt: tuple[int, ...], tokens: tuple[int, ...], divergence: Divergence | None, decode: Decode
) -> ContinuationText:
    def after(before: Sequence[int], more: Sequence[int]) -> str:
        """The text that tokens add to those before them; alone, they would be decoded as a beginning."""
        return decode([*before, *more])[len(decode(before)) :]

    if divergence is None:
        return ContinuationText(decode(prompt), after(prompt, tokens), "", "", "")
    until = (*prompt, *tokens[: divergence.index])
    chosen = (divergence.bundle_token,)
    return ContinuationText(
        prompt=decode(prompt),
        agreed=after(prompt, tokens[: divergence.index]),
        bundle=after(until, chosen),
        reference=after(until, (divergence.reference_token,)),
        rest=after(until + chosen, tokens[divergence.index + 1 :]),
    )
