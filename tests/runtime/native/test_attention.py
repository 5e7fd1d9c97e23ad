"""Attention by kernels of our own is that of onnxruntime's, whatever the threads and the tokens at once."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.group_query_attention import Attention, Cache, attend
from support.matmul_nbits import BUILT_IN, Floats, available

KERNELS = tuple(name for name in available() if name != "avx2")
"""AVX2 has no registers for this, and leaves it to onnxruntime."""
pytestmark = pytest.mark.skipif(not KERNELS, reason="the kernels are not compiled here")

GEMMA = Attention(query_heads=8, key_heads=1, head=256, slots=600)

attentions = st.builds(
    lambda key_heads, shared, **others: Attention(
        query_heads=key_heads * shared, key_heads=key_heads, **others
    ),
    key_heads=st.integers(1, 3),
    shared=st.integers(1, 9),
    head=st.sampled_from((16, 32, 48, 64, 256)),
    slots=st.just(600),
    window=st.sampled_from((0, 1, 7, 300)),
    softcap=st.sampled_from((0.0, 20.0)),
)


def activations(attention: Attention, tokens: int, batch: int = 1, seed: int = 1) -> Floats:
    width = (attention.query_heads + 2 * attention.key_heads) * attention.head
    return np.random.default_rng(seed).standard_normal((batch, tokens, width)).astype(np.float32)


def check(attention: Attention, qkv: Floats, last: list[int]) -> None:
    """Sums of up to 600 terms of the size of one are in another order: 1e-5 is a hundred steps of fp32."""
    expected = Cache(attention, len(last))
    y = attend(attention.session(BUILT_IN), expected, qkv, last)
    for name in KERNELS:
        cache = Cache(attention, len(last))
        found = attend(attention.session(name), cache, qkv, last)
        np.testing.assert_allclose(found, y, rtol=0, atol=1e-5, err_msg=name)
        # A rotation is two products and a sum; slots without a new token stay as they are.
        np.testing.assert_allclose(cache.keys, expected.keys, rtol=0, atol=1e-6, err_msg=name)
        np.testing.assert_array_equal(cache.values, expected.values, err_msg=name)


@settings(max_examples=40, deadline=None)
@given(attentions, st.integers(1, 40), st.integers(0, 560))
def test_numbers_are_onnxruntimes(attention: Attention, tokens: int, before: int) -> None:
    check(attention, activations(attention, tokens), [before + tokens - 1])


@pytest.mark.parametrize("last", [0, 1, 254, 255, 256, 511, 512, 599])
def test_the_ends_of_segments(last: int) -> None:
    check(GEMMA, activations(GEMMA, 1), [last])


def test_rows_of_different_lengths_decode_together() -> None:
    check(GEMMA, activations(GEMMA, 1, batch=3), [7, 590, 300])


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("tokens", [1, 70])
def test_numbers_do_not_depend_on_the_threads(name: str, tokens: int) -> None:
    qkv = activations(GEMMA, tokens)
    alone = attend(GEMMA.session(name), Cache(GEMMA), qkv, [580])
    for threads in (2, 4):
        found = attend(GEMMA.session(name, threads), Cache(GEMMA), qkv, [580])
        np.testing.assert_array_equal(found, alone)


@pytest.mark.parametrize("name", KERNELS)
def test_a_token_does_not_depend_on_how_many_come_at_once(name: str) -> None:
    """One block of queries has its segments computed apart, many have theirs one after the other."""
    qkv = activations(GEMMA, 60)
    session = GEMMA.session(name)
    together = attend(session, Cache(GEMMA), qkv, [559])
    cache = Cache(GEMMA)
    one_by_one = [attend(session, cache, qkv[:, i : i + 1], [500 + i]) for i in range(60)]
    np.testing.assert_array_equal(np.concatenate(one_by_one, axis=1), together)


@pytest.mark.parametrize("name", KERNELS)
def test_large_scores_do_not_overflow(name: str) -> None:
    qkv = activations(GEMMA, 4) * 1e3
    cache = Cache(GEMMA)
    found = attend(GEMMA.session(name), cache, qkv, [300])
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found, attend(GEMMA.session(BUILT_IN), Cache(GEMMA), qkv, [300]), atol=1e-2)


@pytest.mark.parametrize("name", KERNELS)
def test_a_token_beyond_the_cache_is_refused(name: str) -> None:
    with pytest.raises(RuntimeError, match="beyond the cache"):
        attend(GEMMA.session(name), Cache(GEMMA), activations(GEMMA, 1), [600])
