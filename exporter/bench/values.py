"""What is measured, and what a measuring process hands back: values that go through JSON unchanged."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Plan:
    """What every contestant runs in a turn, in a process of its own.

    Attributes:
        prompts: Lengths of the prompts that are read into an empty cache, ascending, each at least 1.
        depths: How many tokens the cache holds when decoding begins, ascending.
        tokens: How many are decoded at each depth.
        chunk: The most tokens of a prompt that are run at once, where a contestant lets one say.
        threads: Within an operator.
    """

    prompts: tuple[int, ...]
    depths: tuple[int, ...]
    tokens: int
    chunk: int
    threads: int

    @property
    def first_prompt(self) -> int:
        """Tokens of the prompt whose first new token is waited for: the shortest, or one."""
        return min(self.prompts, default=1)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Every length that the cache has when something is measured, ascending."""
        return tuple(sorted({*self.prompts, *self.depths}))

    @property
    def slots(self) -> int:
        """How many tokens the longest sequence has."""
        return max([*self.prompts, *(depth + self.tokens for depth in self.depths)])


@dataclass(frozen=True)
class Timing:
    """Some tokens and what they took.

    Attributes:
        at: Of decoding, how many tokens the cache held before; of a prompt, its length.
        tokens: How many were run.
        seconds: All of them together.
        read: Bytes per second that memory was read with before, between and after them; None where that was
            not measured.
    """

    at: int
    tokens: int
    seconds: float
    read: float | None = None

    @property
    def per_second(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds


@dataclass(frozen=True)
class Turn:
    """One run of a contestant from its start to its end.

    Attributes:
        load: Seconds until it could take a prompt, with its libraries imported and its files in the page
            cache; None where it does not tell.
        first_token: A prompt as text, right after loading, until its first new token; None likewise.
        prefill: Prompts into an empty cache.
        decode: New tokens, each chosen greedily from the logits before.
        choosing: Of `decode`, the seconds in which tokens were chosen and made text; None likewise.
        peak: The most resident memory, in bytes, mapped files included.
    """

    load: float | None
    first_token: Timing | None
    prefill: tuple[Timing, ...]
    decode: tuple[Timing, ...]
    choosing: float | None
    peak: int


@dataclass(frozen=True)
class Machine:
    """What the machine could do when a round began, on as many threads.

    Attributes:
        read: Bytes per second that are read from memory.
        read_by: What read them so fast.
        floats: Operations per second of a product of float32 matrices; a multiply-add is two. None where the
            package is missing that writes the graph.
        integers: Likewise, of uint8 and int8 matrices.
    """

    read: float
    read_by: str
    floats: float | None
    integers: float | None


@dataclass(frozen=True)
class StepParts:
    """Where the time of a decoded token goes, in seconds: the median of each part over the tokens.

    Attributes:
        depth: How many tokens the cache held.
        weights: Operators that multiply with weights.
        cache: Operators that read the cache.
        others: All other operators.
        between: Within the graph's run and in no operator.
        around: Between the graph's run and the tokens: bindings, positions, copies.
        choosing: Taking the likeliest token and making it text.
        drawing: Instead of the former, drawing a token with top-k and top-p.
    """

    depth: int
    weights: float
    cache: float
    others: float
    between: float
    around: float
    choosing: float
    drawing: float
