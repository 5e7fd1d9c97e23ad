from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
from support.memory import anonymous, needs_linux
from support.small_bundle import bfloat16_to_float32

from gemma_export.errors import ContextFullError
from gemma_export.runtime.kv_cache import KVCache


def make(batch: int = 1, dtype: str = "float32") -> KVCache:
    return KVCache.allocate(layers=2, batch=batch, kv_heads=2, max_length=8, head_dim=4, dtype=dtype)


@needs_linux
def test_memory_is_taken_when_it_is_written() -> None:
    """After another cache has been let go of, too: what malloc gives again is zeroed from end to end."""
    lasting = []  # What lies behind a cache, so that its memory is not given back to the system.
    for _ in range(3):
        before = anonymous()
        cache = KVCache.allocate(
            layers=4, batch=1, kv_heads=1, max_length=8192, head_dim=256, dtype="float32"
        )
        buffers = [*cache.key_buffers, *cache.value_buffers]
        size = sum(buffer.nbytes for buffer in buffers)
        assert anonymous() - before < size // 4  # What else the process does in the meantime is megabytes.
        for buffer in buffers:
            buffer.fill(1)
        lasting.append(np.ones(2**17))
        assert anonymous() - before > size // 4 * 3
        del cache, buffer, buffers


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


@dataclass(frozen=True)
class Scales:
    key: tuple[float, ...]
    value: tuple[float, ...]


SCALES = [Scales((0.5, 2.0), (0.25, 1.0)), Scales((1.0, 3.0), (4.0, 0.125))]


def make_int8(scales: Sequence[Scales], dtype: str = "int8") -> KVCache:
    return KVCache.allocate(
        layers=2, batch=3, kv_heads=2, max_length=8, head_dim=4, dtype=dtype, scales=scales
    )


def test_int8_is_read_as_what_the_codes_stand_for() -> None:
    cache = make_int8(SCALES)
    random = np.random.default_rng(0)
    for buffer in (*cache.key_buffers, *cache.value_buffers):
        assert buffer.dtype == np.int8
        buffer[...] = random.integers(-128, 128, buffer.shape, np.int8)
    cache.advance(5)
    for layer, scales in enumerate(SCALES):
        keys, values = cache.keys(layer), cache.values(layer)
        assert keys.dtype == values.dtype == np.float32
        assert keys.shape == values.shape == (3, 2, 5, 4)
        for head in range(2):
            # Small integers times 3 or a power of two: exact.
            codes = cache.key_buffers[layer][:, head, :5].astype(np.float64)
            np.testing.assert_array_equal(keys[:, head], codes * scales.key[head])
            codes = cache.value_buffers[layer][:, head, :5].astype(np.float64)
            np.testing.assert_array_equal(values[:, head], codes * scales.value[head])


def test_a_row_of_int8_has_the_same_scales() -> None:
    cache = make_int8(SCALES)
    row = cache.row(2)
    row.value_buffers[1][...] = -3
    row.advance(1)
    np.testing.assert_array_equal(row.values(1)[0, :, 0, 0], [-12, -0.375])


@pytest.mark.parametrize(
    ("dtype", "scales"),
    [
        pytest.param("int8", [], id="none"),
        pytest.param("int8", SCALES[:1], id="of one layer"),
        pytest.param("int8", [SCALES[0], Scales((1.0, 1.0), (1.0,))], id="of one head"),
        pytest.param("float32", SCALES, id="of a float cache"),
    ],
)
def test_scales_that_do_not_fit(dtype: str, scales: list[Scales]) -> None:
    with pytest.raises(ValueError, match=f"the scales do not fit 2 layers of 2 heads in {dtype}"):
        make_int8(scales, dtype)
