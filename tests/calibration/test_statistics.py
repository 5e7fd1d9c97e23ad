"""What is kept of an input: sums that are exact, and a sample that shows every kind of token."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gemma_export.calibration import statistics
from gemma_export.calibration.statistics import SAMPLE_TOKENS, InputStatistics, column_blocks
from gemma_export.errors import CalibrationError


def numbered(tokens: int, channels: int = 2) -> torch.Tensor:
    """Tokens whose first channel is their number."""
    x = torch.randn(tokens, channels, generator=torch.Generator().manual_seed(tokens))
    x[:, 0] = torch.arange(tokens)
    return x


def shown(*parts: torch.Tensor, tokens: int | None = None, **options: bool) -> InputStatistics:
    seen = InputStatistics(parts[0].shape[-1], tokens or sum(len(part) for part in parts), **options)
    for part in parts:
        seen.add(part)
    return seen


def test_sums_are_those_of_all_tokens():
    x = torch.randn(70, 6, generator=torch.Generator().manual_seed(0))
    seen = shown(x[:30], x[30:31], x[31:], hessian=True)
    assert seen.seen == 70
    torch.testing.assert_close(seen.absmax, x.abs().amax(0), rtol=0, atol=0)
    torch.testing.assert_close(seen.mean_magnitude, x.abs().mean(0))
    torch.testing.assert_close(seen.hessian, [x.T @ x])


def test_a_batch_is_tokens_one_after_the_other():
    x = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(shown(x, tokens=10).sample, x.reshape(10, 3))


def test_a_wide_hessian_is_in_blocks(monkeypatch):
    monkeypatch.setattr(statistics, "HESSIAN_COLUMNS", 4)
    assert column_blocks(10) == [slice(0, 4), slice(4, 8), slice(8, 10)]
    x = torch.randn(20, 10, generator=torch.Generator().manual_seed(0))
    whole = x.T @ x
    parts = shown(x, hessian=True).hessian
    for block, part in zip(column_blocks(10), parts, strict=True):
        torch.testing.assert_close(part, whole[block, block])


@pytest.mark.parametrize("strip", [1, 3, 7, 10, 64])
def test_the_strips_of_a_hessian_make_all_of_it(monkeypatch, strip):
    monkeypatch.setattr(statistics, "STRIP", strip)
    x = torch.randn(20, 10, generator=torch.Generator().manual_seed(0))
    seen = shown(x[:12], hessian=True)
    torch.testing.assert_close(seen.hessian, [x[:12].T @ x[:12]])
    seen.add(x[12:])  # What was mirrored is mirrored again.
    torch.testing.assert_close(seen.hessian, [x.T @ x])


def test_nobody_gets_a_hessian_that_was_not_asked_for():
    with pytest.raises(ValueError, match="no Hessian"):
        _ = shown(numbered(3)).hessian


def test_a_short_text_is_kept_whole():
    x = numbered(SAMPLE_TOKENS)
    torch.testing.assert_close(shown(x).sample, x, rtol=0, atol=0)


@given(st.integers(1, 5000), st.lists(st.integers(1, 700), max_size=8))
def test_the_sample_does_not_depend_on_the_pieces(tokens, sizes):
    x = numbered(tokens)
    cuts = [0]
    for size in sizes:
        cuts.append(min(tokens, cuts[-1] + size))
    pieces = [x[a:b] for a, b in zip(cuts, [*cuts[1:], tokens], strict=True)]
    sample = shown(*pieces, tokens=tokens).sample
    assert torch.equal(sample, shown(x).sample)
    kept = sample[:, 0].long()
    assert torch.equal(sample, x[kept])  # Tokens themselves, in order.
    assert (kept.diff() > 0).all()
    # The number of turns that come differs from its expectation by less than 4 in any stretch.
    assert min(tokens, SAMPLE_TOKENS) - 4 <= len(kept) <= SAMPLE_TOKENS


@pytest.mark.parametrize("length", [64, 65, 128, 512, 1000])
def test_every_part_of_a_sequence_is_in_the_sample_as_often(length):
    tokens = length * 128
    kept = shown(numbered(tokens)).sample[:, 0].long()
    quarter = kept % length * 4 // length
    # 512 tokens in 4 quarters. A fixed step of 128 would show the same 4 positions of sequences of 512.
    assert quarter.bincount(minlength=4).tolist() == pytest.approx([128] * 4, abs=8)
    assert len((kept % length).unique()) > min(length, 512) * 0.4
    gaps = kept.diff()
    assert gaps.max() < 3 * tokens / SAMPLE_TOKENS


def test_wide_inputs_keep_fewer_tokens(monkeypatch):
    monkeypatch.setattr(statistics, "SAMPLE_VALUES", 40)
    assert 16 <= len(shown(numbered(100)).sample) <= 20
    assert len(shown(numbered(100, channels=50)).sample) == 1


def test_the_largest_is_of_all_tokens_not_of_the_sample():
    x = torch.ones(2000, 2)
    x[1234, 1] = 50
    seen = shown(x)
    assert seen.absmax.tolist() == [1, 50]


def test_no_tokens_are_no_sample():
    with pytest.raises(CalibrationError, match="no text"):
        _ = InputStatistics(3, 10).sample


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_refused(value):
    x = numbered(5)
    x[3, 1] = value
    with pytest.raises(CalibrationError):
        shown(x)


def test_what_it_was_shown_is_not_kept():
    x = numbered(4)
    seen = shown(x)
    x.zero_()
    assert seen.sample[3, 0] == 3
