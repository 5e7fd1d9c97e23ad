"""How to generate: the options of every call that does, with their defaults and their checks."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypedDict

from gemma_export.errors import UsageError
from gemma_export.runtime.sampling import SamplingOptions
from gemma_export.runtime.speculation import LONGEST_DRAFT


@dataclass(frozen=True)
class GenerationOptions(SamplingOptions):
    """How to generate; greedy by default. These are beside the attributes of `SamplingOptions`.

    Attributes:
        max_new_tokens: The most tokens to generate.
        stop: Strings that end the text; they are not part of it.
        stop_tokens: Ids that end the text and are not part of it; None takes the bundle's, () none.
        prefill_chunk: The most tokens of a prompt that are run at once: more is faster and needs more
            memory for activations.
        draft_tokens: The most tokens that are looked up in the text so far and verified in one step; 0: none.
            The text is the same, up to tokens that are as good as equally likely: steps of several tokens
            round in another order. Seven, in steps of eight, are what processors multiply best.

    Raises:
        UsageError: A value is out of range; the message names it.
    """

    max_new_tokens: int = 256
    stop: Sequence[str] = ()
    stop_tokens: Sequence[int] | None = None
    prefill_chunk: int = 256
    draft_tokens: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_new_tokens < 1:
            raise UsageError(f"max_new_tokens is {self.max_new_tokens}.", "Use at least 1.")
        if self.prefill_chunk < 1:
            raise UsageError(f"prefill_chunk is {self.prefill_chunk}.", "Use at least 1.")
        if not 0 <= self.draft_tokens <= LONGEST_DRAFT:
            raise UsageError(
                f"draft_tokens is {self.draft_tokens}.", f"Use 0 for none, or up to {LONGEST_DRAFT}."
            )
        if isinstance(self.stop, str) or "" in self.stop:
            raise UsageError(f"stop is {self.stop!r}.", 'Give a list of strings that are not empty: ["###"].')

    @classmethod
    def of(cls, keywords: "GenerationKeywords", stop_tokens: Sequence[int]) -> "GenerationOptions":
        """The options of keyword arguments, with `stop_tokens` where they name none.

        Raises:
            UsageError: A value is out of range; the message names it.
            TypeError: There is no such option.
        """
        options = cls(**keywords)
        chosen = options.stop_tokens if options.stop_tokens is not None else stop_tokens
        return replace(options, stop=tuple(options.stop), stop_tokens=tuple(chosen))


class GenerationKeywords(TypedDict, total=False):
    """The fields of `GenerationOptions` as keyword arguments."""

    temperature: float
    top_k: int
    top_p: float
    repetition_penalty: float
    seed: int | None
    max_new_tokens: int
    stop: Sequence[str]
    stop_tokens: Sequence[int] | None
    prefill_chunk: int
    draft_tokens: int
