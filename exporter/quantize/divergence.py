"""How far many variants' next tokens are from a reference's, from logits in blocks of the vocabulary.

So the head is read once for all variants, and no row of logits is ever whole.

With r and v the logits of reference and variant, d = v - r and p the reference's probabilities,

    KL(reference ‖ variant) = log Σ p·exp(d) - Σ p·d      change of a token's loss = log Σ p·exp(d) - d[token]

and both sums are taken over the same rounded d, whose errors therefore cancel to first order: fp32 is enough
for a KL of 1e-9.

Symbols in shape comments: P positions, b tokens of a block, M variants.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

LARGEST_DIFFERENCE = 80.0
"""Differences of logits count up to here: exp(89) is too much for fp32, and a model is broken long before."""


class Divergence:
    """Sums up blocks of logits.

    Args:
        variants: M.
        targets: int64 [P]: the token that follows each position in the text; -1 where none is known.
    """

    def __init__(self, variants: int, targets: Tensor) -> None:
        positions = len(targets)
        self._targets = targets
        self._largest = torch.full((positions,), -torch.inf)  # of the reference's logits
        self._first = torch.full((positions,), -1)  # the token that has it
        self._target = torch.zeros(positions, dtype=torch.float64)
        self._total = torch.zeros(positions, dtype=torch.float64)  # sum of exp(r - largest)
        self._variants = [_Variant(positions) for _ in range(variants)]

    def add(self, start: int, reference: Tensor, variants: Iterable[Tensor]) -> None:
        """Adds the logits of the tokens [start, start + b).

        Args:
            start: The block's first token.
            reference: fp32 [P, b].
            variants: fp32 [P, b] for each variant; they are overwritten.
        """
        block_largest, where = reference.max(dim=1)
        self._first = torch.where(block_largest > self._largest, where + start, self._first)
        largest = torch.maximum(self._largest, block_largest)
        fade = (self._largest - largest).double().exp()  # what was summed up was relative to a smaller one
        weights = (reference - largest[:, None]).exp_()
        self._total = self._total * fade + weights.sum(dim=1)
        self._largest = largest
        inside = ((self._targets >= start) & (self._targets < start + reference.shape[1])).nonzero()[:, 0]
        columns = self._targets[inside] - start
        self._target[inside] = reference[inside, columns].double()
        for state, logits in zip(self._variants, variants, strict=True):
            state.add(start, logits, reference, weights, fade, inside, columns)

    def kl(self) -> Tensor:
        """KL(reference ‖ variant) of every variant at every position, fp64 [M, P]."""
        return torch.stack(
            [
                (torch.log1p(state.grown / self._total) - state.shifted / self._total).clamp_min(0)
                for state in self._variants
            ]
        )

    def loss_changes(self) -> Tensor:
        """Change of the loss of the token that follows, fp64 [M, P]; of no meaning where none is known."""
        return torch.stack(
            [torch.log1p(state.grown / self._total) - state.target for state in self._variants]
        )

    def reference_losses(self) -> Tensor:
        """The reference's loss of the token that follows, fp64 [P]; of no meaning where none is known."""
        return self._largest.double() + self._total.log() - self._target

    def agreements(self) -> Tensor:
        """Whether a variant's most likely token is the reference's, bool [M, P]."""
        return torch.stack([state.first == self._first for state in self._variants])


class _Variant:
    """The sums of one variant, relative to the largest logit of the reference."""

    def __init__(self, positions: int) -> None:
        self.shifted = torch.zeros(positions, dtype=torch.float64)  # sum of weights · d
        self.grown = torch.zeros(positions, dtype=torch.float64)  # sum of weights · (exp(d) - 1)
        self.target = torch.zeros(positions, dtype=torch.float64)  # d of the token that follows
        self.largest = torch.full((positions,), -torch.inf)
        self.first = torch.full((positions,), -1)

    def add(
        self,
        start: int,
        logits: Tensor,
        reference: Tensor,
        weights: Tensor,
        fade: Tensor,
        inside: Tensor,
        columns: Tensor,
    ) -> None:
        block_largest, where = logits.max(dim=1)
        self.first = torch.where(block_largest > self.largest, where + start, self.first)
        self.largest = torch.maximum(self.largest, block_largest)
        difference = logits.sub_(reference).clamp_(-LARGEST_DIFFERENCE, LARGEST_DIFFERENCE)
        self.target[inside] = difference[inside, columns].double()
        self.shifted = self.shifted * fade + _row_products(weights, difference)
        self.grown = self.grown * fade + _row_products(weights, difference.expm1_())


def _row_products(a: Tensor, b: Tensor) -> Tensor:
    """Scalar product of every row, fp64 [P]."""
    return (a * b).sum(dim=1).double()
