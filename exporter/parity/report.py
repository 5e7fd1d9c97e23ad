"""What the parity gate found: values, and their JSON."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from gemma_export.runtime.parity import Budget, ParityFigures

Level = Literal["quick", "full"]
Verdict = Literal["pass", "fail"]
Phase = Literal["prefill", "decode", "continuation"]
PHASES: tuple[Phase, ...] = ("prefill", "decode", "continuation")


@dataclass(frozen=True)
class MeasuredText:
    """A text that was run, and how.

    Args:
        name: What it is called.
        text: What was run of it; None where there was nothing to decode the tokens with.
        tokens: How many tokens of it were run, the beginning-of-sequence token included.
        measured: How many positions' logits were compared.
        chunks: Tokens of each step of the prefill; the rest was decoded one by one.
    """

    name: str
    text: str | None
    tokens: int
    measured: int
    chunks: tuple[int, ...]


@dataclass(frozen=True)
class PhaseErrors:
    """The logits' errors of one way of running, token by token.

    Args:
        phase: `prefill` in chunks of several tokens; `decode` of a text's tokens one by one;
            `continuation`, the bundle's own greedy tokens.
        positions: Each measured token's position.
        errors: Its largest absolute error of a logit; NaN where a logit is not a number.
        agreements: Of how many tokens the most likely next token is the same.
    """

    phase: Phase
    positions: tuple[int, ...]
    errors: tuple[float, ...]
    agreements: int


@dataclass(frozen=True)
class LayerErrors:
    """How far the keys and values of one layer in the bundle's cache are from the reference's.

    Args:
        layer: The layer.
        key_max: Largest |bundle - reference| / largest |reference|.
        key_rms: Root mean square of the difference / that of the reference.
        value_max: As `key_max`, of the values.
        value_rms: As `key_rms`, of the values.
    """

    layer: int
    key_max: float
    key_rms: float
    value_max: float
    value_rms: float


@dataclass(frozen=True)
class Divergence:
    """Where a greedy continuation of the bundle first leaves the reference's own.

    Args:
        index: Which token of the continuation, from 0.
        position: The position whose logits chose it.
        bundle_token: What the bundle took.
        reference_token: What the reference takes there.
        margin: By how much the reference prefers its own: the difference of its two logits.
        error: The largest absolute error of the bundle's logits there.
        near_tie: Whether the error that the budget allows explains the margin.
    """

    index: int
    position: int
    bundle_token: int
    reference_token: int
    margin: float
    error: float
    near_tie: bool


@dataclass(frozen=True)
class ContinuationText:
    """The pieces of a continuation for people: what both say, where they part, what the bundle said then."""

    prompt: str
    agreed: str
    bundle: str
    reference: str
    rest: str


@dataclass(frozen=True)
class Continuation:
    """A greedy continuation that the bundle wrote and the reference verified.

    Args:
        name: The text whose beginning is the prompt.
        prompt_tokens: The prompt.
        tokens: What the bundle wrote.
        divergence: Where the reference disagrees first; None where it says the same to the end.
        text: All of it decoded; None where there was nothing to decode the tokens with.
    """

    name: str
    prompt_tokens: tuple[int, ...]
    tokens: tuple[int, ...]
    divergence: Divergence | None
    text: ContinuationText | None


@dataclass(frozen=True)
class Quantized:
    """What of a bundle is quantized.

    Args:
        scheme: As its manifest names it.
        forms: How many linear layers, with the embedding table, have each form, by `graphs.formats.Form`.
        kept: Why each layer that keeps 16 bits does, by name.
        cache: Format of the KV cache.
    """

    scheme: str
    forms: Mapping[str, int]
    kept: Mapping[str, str]
    cache: str


@dataclass(frozen=True)
class Cost:
    """What the measuring took.

    Args:
        bundle_steps: Runs of the bundle's graph.
        bundle_tokens: Tokens in those.
        bundle_seconds: Time of those.
        reference_tokens: Tokens that went through the reference.
        reference_seconds: Time of the reference, its logits included.
    """

    bundle_steps: int
    bundle_tokens: int
    bundle_seconds: float
    reference_tokens: int
    reference_seconds: float


@dataclass(frozen=True)
class ParityReport:
    """The verdict on a bundle, with everything it rests on.

    Args:
        subject: What was measured, for people.
        verdict: `pass`, or `fail` for at least one reason.
        reasons: Why it fails, in words.
        level: How much was measured.
        precision: Whose budget was applied.
        reference: What it was held against, for people.
        figures: The logits' figures over all measured tokens.
        budget: The bounds, as they were applied to this many tokens.
        cache_bound: The bound on `key_max` and `value_max` of every layer.
        phases: The logits' errors by way of running.
        layers: The caches' errors by layer.
        continuations: Greedy continuations.
        texts: What was run.
        max_length: Slots of the bundle's cache.
        logits: Which logits the bundle gives: only measured tokens have any.
        cost: Steps, tokens and seconds.
        versions: Package → version.
        quantized: What is quantized; None where nothing is, or nothing is known of it.
    """

    subject: str
    verdict: Verdict
    reasons: tuple[str, ...]
    level: Level
    precision: str
    reference: str
    figures: ParityFigures
    budget: Budget
    cache_bound: float
    phases: tuple[PhaseErrors, ...]
    layers: tuple[LayerErrors, ...]
    continuations: tuple[Continuation, ...]
    texts: tuple[MeasuredText, ...]
    max_length: int
    logits: Literal["last", "all"]
    cost: Cost
    versions: Mapping[str, str]
    quantized: Quantized | None = None

    def divergences(self) -> tuple[Divergence, ...]:
        """First divergences of the continuations that have one."""
        return tuple(c.divergence for c in self.continuations if c.divergence is not None)

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON values. JSON has no NaN and no infinity: they are null."""
        plain: dict[str, Any] = json_values(asdict(self))
        return plain

    def summary(self) -> dict[str, Any]:
        """The figures that a manifest shows, as JSON values."""
        figures = self.figures
        names = (
            "tokens",
            "max_absolute_error",
            "mean_absolute_error",
            "max_relative_error",
            "mean_kl",
            "max_kl",
            "top1_agreement",
            "reference_perplexity",
            "bundle_perplexity",
        )
        summary: dict[str, Any] = json_values(
            {
                "reference": self.reference,
                "reasons": self.reasons,
                **{name: getattr(figures, name) for name in names},
                "max_key_error": largest(layer.key_max for layer in self.layers),
                "max_value_error": largest(layer.value_max for layer in self.layers),
                "continuations": len(self.continuations),
                "greedy_divergences": len(self.divergences()),
            }
        )
        return summary


def largest(values: Iterable[float]) -> float:
    """The largest of some values; NaN counts as larger than any: `max` alone may pass over it."""
    return max(values, key=lambda value: math.inf if math.isnan(value) else value, default=math.nan)


def json_values(value: Any) -> Any:
    """A copy with lists for tuples, and None for floats that are not finite."""
    if isinstance(value, Mapping):
        return {key: json_values(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_values(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
