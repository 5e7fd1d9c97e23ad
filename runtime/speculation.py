"""Speculation by prompt lookup: what may come next is looked up in the text itself and verified in one step.

Text that quotes, edits or repeats says again what was said before. The last tokens are looked up in all that
came before them; what followed them there is the draft. One step over the draft gives the logits after each
of its tokens, and a token is chosen from each by the rule that holds without drafts, with the same random
numbers: as long as it is the draft's next one, the next logits are those of the text as it is. The others are
not looked at. A step that reads all weights once can so give several tokens, and a draft never decides one.

How long a draft pays follows from how often drafts held of late. No clock is asked, so that the same call
takes the same steps each time.

Source: Saxena, Prompt Lookup Decoding (2023); Leviathan et al., arXiv 2211.17192, section 3.3, for the gain.
"""

from collections.abc import Sequence

LONGEST_DRAFT = 64
"""Tokens: one step verifies no more than this."""

_SIZES = (4, 3, 2)  # How many of the last tokens are looked up; what matches more holds more often.

_COST = 0.1
"""What a draft's token adds to a step, in steps of one token: 0.02 to 0.1 where the weights come from memory
and a step has up to eight."""

_MEMORY = 0.9  # What an observation still counts when the next one comes.


class Drafter:
    """The drafts of one sequence, and how they did.

    Args:
        tokens: The sequence, which grows while it is generated; not copied.
        longest: The most tokens of a draft; 0 makes none.
    """

    def __init__(self, tokens: Sequence[int], longest: int) -> None:
        self._tokens = tokens
        self._longest = longest
        self._following: dict[tuple[int, ...], int] = {}  # n-gram → where its latest occurrence ends
        self._known = 0  # tokens that n-grams were taken of
        self._odds = {size: _Odds() for size in _SIZES}
        self._guess: tuple[int, int, list[int]] | None = None  # size of the match, where it begins, tokens

    def draft(self, room: int) -> list[int]:
        """What may come next; nothing where the last tokens are new, or where a draft would not pay.

        Args:
            room: The most tokens that have a place.
        """
        if not (longest := min(self._longest, room)) > 0:
            return []
        self._see_what_came()
        self._learn()
        end = len(self._tokens)
        for size in _SIZES:
            start = self._following.get(tuple(self._tokens[-size:]))
            if start is not None:
                count = self._odds[size].best_length(longest)
                # One token is guessed at least: whether it comes is seen without a step over it.
                guess = self._repeated(start, max(count, 1))
                self._guess = (size, end, guess)
                return guess[:count]
        return []

    def _learn(self) -> None:
        """Takes the n-grams that something follows; a later occurrence hides an earlier one."""
        end = len(self._tokens)
        for stop in range(self._known + 1, end):
            for size in _SIZES:
                if size <= stop:
                    self._following[tuple(self._tokens[stop - size : stop])] = stop
        self._known = max(self._known, end - 1)

    def _repeated(self, start: int, count: int) -> list[int]:
        """The tokens from `start` on; where they reach the end, the sequence goes round from there."""
        found = list(self._tokens[start : start + count])
        return [found[i % len(found)] for i in range(count)]

    def _see_what_came(self) -> None:
        """Counts how far the last guess held."""
        if self._guess is None:
            return
        size, begin, guess = self._guess
        came = self._tokens[begin : begin + len(guess)]
        held = next((i for i, pair in enumerate(zip(guess, came, strict=False)) if pair[0] != pair[1]), None)
        self._odds[size].count(len(came) if held is None else held, failed=held is not None)
        self._guess = None


class _Odds:
    """How likely the next token of a draft holds where those before it did; old observations fade."""

    def __init__(self) -> None:
        self._held, self._tried = 1.0, 2.0

    def count(self, held: int, *, failed: bool) -> None:
        """A draft of which so many tokens held, and the next one failed or was not there."""
        self._held = _MEMORY * self._held + held
        self._tried = _MEMORY * self._tried + held + failed

    def best_length(self, longest: int) -> int:
        """The length of draft that pays most: the k of the largest (1 + p + … + p^k) / (1 + c·k)."""
        probability = self._held / self._tried
        expected, best, most = 1.0, 0, 1.0
        for count in range(1, longest + 1):
            expected += probability**count
            if (gain := expected / (1 + _COST * count)) > most:
                best, most = count, gain
        return best
