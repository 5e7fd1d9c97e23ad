"""Rolling caches: a local layer keeps the positions that a query can still see, and overwrites the others.

Position p lies in slot p mod S. Written up to position `last`, slot s therefore holds the largest position
<= last that leaves s, if that is not negative; the graph makes its mask from the same rule. It is exact under
two conditions, which `parts` and `can_go_on` see to.

1. A step of T tokens has S >= window + T - 1. Its tokens are written before its first query looks, and they
   must not overwrite what that query sees. Nor may a step go on at slot 0: graphs write what is contiguous.
2. Who goes back to position p, with positions up to `written` written before, still finds the window of p.
   A slot that was written with a position >= p is taken to hold the position S before that: this must lie
   outside the window, or before the beginning.

Symbols in shape comments: B rows, T tokens of a step, S slots.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Positions = npt.NDArray[np.int64]


@dataclass(frozen=True)
class RollingCache:
    """Which caches of a graph roll, and what that asks of those who run it.

    Attributes:
        layers: The layers whose caches roll.
        window: Tokens that such a layer sees, the query's own among them.
        chunk: The most tokens of a step.
        slots: S, of a row of such a layer; at least window + chunk - 1.
        saved_per_row: Bytes that a row of the whole cache would have more if none rolled.
    """

    layers: tuple[int, ...]
    window: int
    chunk: int
    slots: int
    saved_per_row: int

    def parts(self, starts: Positions, tokens: int) -> list[slice]:
        """The parts of a step that can each be run at once, in order.

        Args:
            starts: int64 [B], the first position of each row.
            tokens: T.
        """
        ends = {tokens}
        for start in set(starts.tolist()):
            ends.update(range(self.slots - start % self.slots, tokens, self.slots))
        parts, begin = list[slice](), 0
        for end in sorted(ends):
            parts += [slice(at, min(at + self.chunk, end)) for at in range(begin, end, self.chunk)]
            begin = end
        return parts

    def can_go_on(self, starts: Positions, written: Positions) -> npt.NDArray[np.bool_]:
        """Whether rows can go on at their positions.

        Args:
            starts: int64 [B], the first position of each row that is to be written.
            written: int64 [B], how many positions of each row have been written since its beginning.
        """
        last_lost = written - 1 - self.slots
        can: npt.NDArray[np.bool_] = (starts == 0) | (last_lost < 0) | (last_lost <= starts - self.window)
        return can
