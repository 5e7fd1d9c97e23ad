import numpy as np
import pytest
from support.small_bundle import bfloat16_to_float32

from gemma_export.errors import ContextFullError
from gemma_export.runtime.kv_cache import KVCache


def make(batch: int = 1, dtype: str = "float32") -> KVCache:
    return KVCache.allocate(layers=2, batch=batch, kv_heads=2, max_length=8, head_dim=4, dtype=dtype)


def test_begins_empty_and_aligned() -> None:
    cache = make(batch=3)
    assert cache.length == 0
    assert cache.keys(0).shape == (3, 2, 0, 4)
    for buffer in (*cache.key_buffers, *cache.value_buffers):
        assert not buffer.any()
        assert buffer.flags.c_contiguous
        assert buffer.ctypes.data % 64 == 0


def test_a_row_shares_memory_and_length() -> None:
    cache = make(batch=3)
    row = cache.row(1)
    row.key_buffers[0][...] = 7
    row.advance(5)
    assert cache.lengths.tolist() == [0, 5, 0]
    assert (cache.key_buffers[0][1] == 7).all()
    assert not cache.key_buffers[0][[0, 2]].any()
    assert row.key_buffers[0].flags.c_contiguous
    assert row.batch == 1


def test_keys_and_values_are_views_of_the_filled_slots() -> None:
    cache = make()
    cache.advance(3)
    keys, values = cache.keys(1), cache.values(1)
    assert keys.shape == values.shape == (1, 2, 3, 4)
    assert np.shares_memory(keys, cache.key_buffers[1])
    assert np.shares_memory(values, cache.value_buffers[1])


def test_bfloat16_is_read_as_float32() -> None:
    cache = make(dtype="bfloat16")
    bits = np.random.default_rng(0).integers(0, 0x7F80, cache.key_buffers[0].shape).astype(np.uint16)
    cache.key_buffers[0][...] = bits
    cache.advance(8)
    np.testing.assert_array_equal(cache.keys(0), bfloat16_to_float32(bits))


def test_room_up_to_the_last_slot() -> None:
    cache = make(batch=2)
    cache.row(1).advance(5)
    cache.require(3)
    with pytest.raises(ContextFullError, match=r"5 tokens and 4 new ones do not fit .* context of 8"):
        cache.require(4)
    assert cache.lengths.tolist() == [0, 5]


def test_one_length_only_where_there_is_one() -> None:
    cache = make(batch=2)
    cache.row(1).advance(5)
    with pytest.raises(ValueError, match="different lengths"):
        _ = cache.length


def test_truncate_shortens_only() -> None:
    cache = make(batch=2)
    cache.row(0).advance(2)
    cache.row(1).advance(5)
    cache.truncate(3)
    assert cache.lengths.tolist() == [2, 3]
