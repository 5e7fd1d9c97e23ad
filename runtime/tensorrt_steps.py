"""Which launches of an engine make a step: a step has any size, a launch the sizes of a profile.

Symbols: B rows, T tokens per row.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from gemma_export.errors import BundleError
from gemma_export.runtime.manifest import ProfileInfo


@dataclass(frozen=True)
class Launch:
    """One execution of the engine, for a part of a step.

    Attributes:
        profile: Index of the optimization profile.
        row: The step's first row in it.
        rows: How many of the step's.
        padded: Rows it is run with: `rows`, or more where the profile has no smaller batch.
        token: The first token of each row.
        tokens: Tokens per row.
    """

    profile: int
    row: int
    rows: int
    padded: int
    token: int
    tokens: int


@lru_cache(maxsize=256)
def plan_step(profiles: tuple[ProfileInfo, ...], batch: int, tokens: int) -> tuple[Launch, ...]:
    """The launches that run `tokens` tokens of `batch` rows, each row's tokens in order.

    One token is run by a decode profile where there is one, all rows together where a profile holds so many
    or more; more tokens are run in chunks of what the prefill profile holds.

    Raises:
        BundleError: The profiles hold no such step.
    """
    launches = []
    row = 0
    while row < batch:
        index, rows, padded = _take_rows(profiles, batch - row, tokens)
        chunk = profiles[index].tokens.max
        launches += [
            Launch(index, row, rows, padded, token, min(chunk, tokens - token))
            for token in range(0, tokens, chunk)
        ]
        row += rows
    return tuple(launches)


def capacity(profiles: tuple[ProfileInfo, ...], batch: int) -> int:
    """Rows that a cache of `batch` rows needs memory for, so that every launch's padding has a place."""
    return max(
        launch.row + launch.padded for tokens in (1, 2) for launch in plan_step(profiles, batch, tokens)
    )


def _take_rows(profiles: Sequence[ProfileInfo], batch: int, tokens: int) -> tuple[int, int, int]:
    """A profile for the next of `batch` rows, how many of them, and with how many it is run."""
    fits = [index for index, profile in enumerate(profiles) if profile.tokens.min == 1]
    if not fits:
        raise BundleError(
            "The engine has no profile that runs any number of tokens.",
            "Compile it again with `gemma-export compile`.",
        )
    if tokens == 1:  # What is made for one token comes first.
        fits.sort(key=lambda index: profiles[index].tokens.max)
    else:
        chunk = max(profiles[index].tokens.max for index in fits)
        fits = [index for index in fits if profiles[index].tokens.max == chunk]
    for index in fits:
        if profiles[index].batch.min <= batch <= profiles[index].batch.max:
            return index, batch, batch
    larger = [index for index in fits if profiles[index].batch.min > batch]
    if larger:
        index = min(larger, key=lambda index: profiles[index].batch.min)
        return index, batch, profiles[index].batch.min
    index = max(fits, key=lambda index: profiles[index].batch.max)
    rows = profiles[index].batch.max
    return index, rows, rows
