"""GPTQ: codes chosen one column after the other, each making up for the errors of those before it.

Rounding a weight w to q leaves the outputs with the squared error (w - q) H (w - q)ᵀ, where H = XᵀX over the
calibration text. Let H = R Rᵀ with R upper triangular: the error is then the sum over columns j of

    (R_jj · (w_j - q_j) + Σ_{i<j} (w_i - q_i) · R_ij)²

so going from the first column to the last, q_j is best rounded from w_j + Σ_{i<j} (w_i - q_i) · R_ij / R_jj.
That is GPTQ (arXiv 2210.17323) without an inverse of H: the same codes by a nearest-plane argument (Babai;
arXiv 2507.18553). Before a block's scales are chosen, its columns are moved to where they make up for all
earlier errors together.

Symbols in shape comments: R rows of a weight, K columns, k columns of one block of H, b of a group that has
one scale, G groups in all.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from gemma_export.calibration.slices import in_row_slices
from gemma_export.calibration.statistics import column_blocks
from gemma_export.graphs.formats import WeightFormat
from gemma_export.graphs.quantization import scales_for
from gemma_export.graphs.quantized import WORKERS

DAMPING = 0.1
"""What is added to every diagonal element of H, as a part of it: the text shows only some of what x can be.
A part of each element, not of their mean, so that channels of all sizes are treated alike."""
ROWS = 4096
"""Rows that are worked on at once: their columns fit a core's cache, and a call has enough to do."""
STEP = 128
"""Columns that are taken together where a scale stands for the whole row."""


class Feedback:
    """How much of the error in one column the later ones make up for.

    Args:
        hessian: XᵀX of each block of `column_blocks`: fp32 [k, k]. It may be singular, and have zeros on its
            diagonal: such a column is rounded for itself.
        block: b, columns that share a scale, a divisor of each k; None for one scale per row.
        damping: Added to the diagonal, as a part of it.
    """

    def __init__(self, hessian: Sequence[Tensor], block: int | None, damping: float = DAMPING) -> None:
        self.step = block or STEP
        self._sizes = [_sizes(part) for part in hessian]
        # The factor is that of the correlations, so that it holds whatever x is divided by.
        self._parts = [
            self._feedback(part, size, damping) for part, size in zip(hessian, self._sizes, strict=True)
        ]

    def parts(self, smoothing: Tensor | None) -> list[Tensor]:
        """Of x divided by a vector [K]: for each block of H a matrix F fp32 [k, k], upper triangular.

        Within a group, F_ij is the part of column i's error that is added to column j; above it, what is
        added to column j before anything in its own group is rounded.
        """
        scaled = []
        start = 0
        for part, size in zip(self._parts, self._sizes, strict=True):
            stop = start + len(size)
            size = size if smoothing is None else size / smoothing[start:stop]
            scaled.append(part * (size[:, None] / size[None, :]))
            start = stop
        return scaled

    def _feedback(self, hessian: Tensor, size: Tensor, damping: float) -> Tensor:
        correlation = hessian.double() / (size[:, None] * size[None, :]).double()
        correlation.diagonal().fill_(1 + damping)
        # Cholesky gives a lower factor; of the matrix read backwards it is the upper one read backwards.
        factor = torch.linalg.cholesky(correlation.flip(0, 1)).flip(0, 1)
        result = torch.zeros_like(hessian)
        for start in range(0, len(factor), self.step):
            group = slice(start, min(start + self.step, len(factor)))
            corner = factor[group, group]
            before = torch.linalg.solve_triangular(corner, factor[:start, group], upper=True, left=False)
            result[:start, group] = before.float()
            result[group, group] = (corner / corner.diagonal()).float()
        return result


def _sizes(hessian: Tensor) -> Tensor:
    """Root of the diagonal; 1 where a channel was always zero."""
    size = hessian.diagonal().sqrt()
    return torch.where(size > 0, size, 1.0)


def gptq(rows: Tensor, feedback: Sequence[Tensor], form: WeightFormat) -> tuple[Tensor, Tensor]:
    """Codes and scales of some rows of a weight; rows do not depend on each other.

    Args:
        rows: fp32 [R, K], columns multiplied with the smoothing vector.
        feedback: `Feedback.parts` for the same block size and smoothing.
        form: The weight's format.

    Returns:
        Codes int8 [R, K] and scales fp32 [R, G], the scales by least squared error of the moved columns.
    """
    columns = rows.shape[1]
    codes = torch.empty(rows.shape, dtype=torch.int8)
    scales = torch.empty(len(rows), form.groups(columns))

    def work(start: int, stop: int) -> None:
        part = rows[start:stop].float()
        if form.block is None:
            scales[start:stop] = scales_for(part, form, "mse")
        for block, matrix in zip(column_blocks(columns), feedback, strict=True):
            groups = slice(block.start // form.block, block.stop // form.block) if form.block else slice(0, 1)
            columnwise = part[:, block].T.contiguous()
            codes[start:stop, block] = _columns(columnwise, matrix, form, scales[start:stop, groups]).T

    in_row_slices(work, len(rows), min(ROWS, -(-len(rows) // WORKERS)))
    return codes, scales


def _columns(weight: Tensor, feedback: Tensor, form: WeightFormat, scales: Tensor) -> Tensor:
    """Codes int8 [k, R] of columns [k, R], each a row here; fills in `scales` [R, ..] of groups."""
    step = form.block or STEP
    codes = torch.empty(weight.shape, dtype=torch.int8)
    errors = torch.empty_like(weight)  # w - q of every column done
    for index, start in enumerate(range(0, len(weight), step)):
        group = slice(start, min(start + step, len(weight)))
        moved = torch.addmm(weight[group], feedback[:start, group].T, errors[:start])
        if form.block is not None:
            scales[:, index] = scales_for(moved.T.contiguous(), form, "mse")[:, 0]
        scale = scales[:, index if form.block else 0].contiguous()
        rounded = _group(moved, feedback[group, group].T.contiguous(), scale, form, codes[group])
        torch.sub(weight[group], rounded, out=errors[group])
    return codes


def _group(moved: Tensor, feedback: Tensor, scale: Tensor, form: WeightFormat, codes: Tensor) -> Tensor:
    """Rounds the columns [b, R] of a group with scales [R]; fills in codes, returns what they stand for."""
    errors = torch.empty_like(moved)
    rounded = torch.empty_like(moved)
    for j in range(len(moved)):
        column = torch.addmv(moved[j], errors[:j].T, feedback[j, :j]) if j else moved[j]
        code = (column / scale).round_().clamp_(form.lowest, form.highest)
        codes[j] = code
        torch.mul(code, scale, out=rounded[j])
        torch.sub(moved[j], rounded[j], out=errors[j])
    return rounded
