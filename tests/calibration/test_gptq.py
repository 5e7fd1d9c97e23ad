"""GPTQ: the textbook's codes, and never more error than rounding alone."""

import itertools

import pytest
import torch
from torch import Tensor

from gemma_export.calibration import gptq as module
from gemma_export.calibration import statistics
from gemma_export.calibration.gptq import DAMPING, Feedback, gptq
from gemma_export.graphs.formats import WeightFormat
from gemma_export.graphs.quantization import decode, encode, mse_scales, round_trip

FORMATS = [
    WeightFormat(4, 16, negative_scales=True),
    WeightFormat(4, 32),
    WeightFormat(4),
    WeightFormat(8, 16),
    WeightFormat(8),
]
formats = pytest.mark.parametrize("form", FORMATS, ids=lambda f: f"{f.bits} bits, block {f.block}")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def correlated(tokens: int, columns: int, seed: int = 0) -> Tensor:
    """Inputs whose channels have much in common."""
    common = random(tokens, 4, seed=seed) @ random(4, columns, seed=seed + 1)
    return common + 0.5 * random(tokens, columns, seed=seed + 2)


def solved(
    rows: Tensor, hessian: Tensor, form: WeightFormat, smoothing: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    return gptq(rows, Feedback([hessian], form.block).parts(smoothing), form)


def error(rows: Tensor, rounded: Tensor, hessian: Tensor) -> float:
    difference = (rows - rounded).double()
    return float(((difference @ hessian.double()) * difference).sum())


def textbook(rows: Tensor, hessian: Tensor, form: WeightFormat, scales: Tensor) -> Tensor:
    """Optimal brain surgery as Frantar et al. write it, by the inverse of H, with scales that are given."""
    rows, hessian = rows.double().clone(), hessian.double()
    hessian = hessian + torch.diag(DAMPING * hessian.diagonal())
    inverse = torch.linalg.inv(hessian)
    codes = torch.empty(rows.shape)
    for j in range(rows.shape[1]):
        scale = scales[:, j // (form.block or rows.shape[1])].double()
        codes[:, j] = (rows[:, j] / scale).round().clamp(form.lowest, form.highest)
        off = (rows[:, j] - codes[:, j] * scale) / inverse[0, 0]
        rows[:, j:] -= off[:, None] * inverse[0][None]
        # The column is fixed: the others' inverse is what is left after its elimination.
        inverse = (inverse - inverse[:, :1] @ inverse[:1] / inverse[0, 0])[1:, 1:]
    return codes.to(torch.int8)


@formats
def test_the_codes_are_those_of_the_textbook(form):
    x = correlated(300, 64)
    rows, hessian = random(20, 64, seed=9), x.T @ x
    codes, scales = solved(rows, hessian, form)
    # In fp32 and fp64 a number halfway between two codes may fall on either side, and shifts what follows.
    assert (codes != textbook(rows, hessian, form, scales)).float().mean() < 0.01


@formats
def test_without_correlation_it_is_rounding_alone(form):
    rows = random(20, 64)
    codes, scales = solved(rows, torch.diag(torch.rand(64) + 0.1), form)
    torch.testing.assert_close(scales, mse_scales(rows, form), rtol=0, atol=0)
    assert torch.equal(codes, encode(rows, scales, form))


def test_without_correlation_nothing_is_better():
    form, rows = WeightFormat(4), random(2, 3)
    hessian = torch.diag(torch.tensor([1.0, 5.0, 0.2]))
    codes, scales = solved(rows, hessian, form)
    for row, scale, chosen in zip(rows, scales, codes, strict=True):
        every = torch.tensor(list(itertools.product(range(form.lowest, form.highest + 1), repeat=3)))
        errors = ((row - every * scale).square() * hessian.diagonal()).sum(1)
        assert error(row[None], (chosen * scale)[None], hessian) <= float(errors.min()) * (1 + 1e-5)


@formats
@pytest.mark.parametrize("seed", range(4))
def test_it_is_better_than_rounding_alone(form, seed):
    x = correlated(300, 64, seed)
    rows, hessian = random(20, 64, seed=seed + 50), x.T @ x
    codes, scales = solved(rows, hessian, form)
    alone = min(
        error(rows, round_trip(rows, form), hessian), error(rows, round_trip(rows, form, "mse"), hessian)
    )
    # Four directions hold most of what these inputs are; seen were 0.2 to 0.45 of the error.
    assert error(rows, decode(codes, scales, form), hessian) < 0.6 * alone


@formats
def test_the_shapes_are_those_of_the_format(form):
    codes, scales = solved(random(5, 64), torch.eye(64), form)
    assert codes.dtype == torch.int8
    assert codes.shape == (5, 64)
    assert scales.shape == (5, form.groups(64))
    assert form.lowest <= codes.min()
    assert codes.max() <= form.highest


@pytest.mark.parametrize(
    "x",
    [torch.zeros(5, 32), correlated(3, 32), torch.ones(10, 1) @ random(1, 32)],
    ids=["nothing", "fewer tokens than columns", "one direction"],
)
def test_a_singular_hessian_will_do(x):
    form, rows = FORMATS[0], random(6, 32)
    codes, scales = solved(rows, x.T @ x, form)
    rounded = decode(codes, scales, form)
    assert rounded.isfinite().all()
    hessian = x.T @ x
    assert error(rows, rounded, hessian) <= error(rows, round_trip(rows, form, "mse"), hessian) * (1 + 1e-6)


def test_columns_that_were_never_used_are_rounded_for_themselves():
    form, rows, x = FORMATS[0], random(6, 32), correlated(100, 32)
    dead = [0, 5, 31]
    x[:, dead] = 0
    codes, scales = solved(rows, x.T @ x, form)
    alone = encode(rows, scales, form)
    assert torch.equal(codes[:, dead], alone[:, dead])
    assert not torch.equal(codes, alone)


def test_smoothing_needs_no_other_hessian():
    form, rows, x = FORMATS[0], random(6, 32), correlated(100, 32)
    s = torch.logspace(-2, 2, 32)
    codes, scales = solved(rows * s, x.T @ x, form, s)
    direct, direct_scales = solved(rows * s, (x / s).T @ (x / s), form)
    assert (codes != direct).float().mean() < 0.01  # fp32 rounds the two Hessians differently.
    torch.testing.assert_close(scales, direct_scales, rtol=1e-3, atol=1e-6)


def test_the_size_of_channels_does_not_matter():
    form, rows, x = FORMATS[2], random(6, 32), correlated(100, 32)
    codes, _ = solved(rows, x.T @ x, form)
    large, _ = solved(rows, (1e4 * x).T @ (1e4 * x), form)
    assert (codes != large).float().mean() < 0.01


def test_rows_are_independent(monkeypatch):
    form, rows, x = FORMATS[0], random(23, 32), correlated(100, 32)
    codes, scales = solved(rows, x.T @ x, form)
    monkeypatch.setattr(module, "ROWS", 5)
    chunked, chunked_scales = solved(rows, x.T @ x, form)
    # Products of other shapes sum in another order.
    assert (codes != chunked).float().mean() < 0.01
    torch.testing.assert_close(scales, chunked_scales, rtol=1e-4, atol=1e-6)


def test_blocks_of_columns_are_independent(monkeypatch):
    form, rows, x = FORMATS[0], random(7, 64), correlated(100, 64)
    monkeypatch.setattr(statistics, "HESSIAN_COLUMNS", 32)
    seen = statistics.InputStatistics(64, 100, hessian=True)
    seen.add(x)
    codes, scales = gptq(rows, Feedback(seen.hessian, 16).parts(None), form)
    for columns in (slice(0, 32), slice(32, 64)):
        part = x[:, columns]
        alone, alone_scales = solved(rows[:, columns].contiguous(), part.T @ part, form)
        assert torch.equal(codes[:, columns], alone)
        groups = slice(columns.start // 16, columns.stop // 16)
        torch.testing.assert_close(scales[:, groups], alone_scales, rtol=0, atol=0)


def test_the_number_of_threads_is_put_back():
    threads = torch.get_num_threads()
    solved(random(3, 32), torch.eye(32), FORMATS[0])
    assert torch.get_num_threads() == threads
