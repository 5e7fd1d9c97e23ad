"""Rolling caches: whatever is run, each query sees its window and nothing else.

The device is played by a list of slots that remember which token was last written there.
"""

from dataclasses import replace
from itertools import count

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_export.errors import OverwrittenError, UsageError
from gemma_export.exporter.cache_layout import rolling_cache
from gemma_export.exporter.config import GemmaConfig, preset
from gemma_export.exporter.decoder import rolling_mask, written_slots
from gemma_export.exporter.engines.budget import MemoryPlan
from gemma_export.exporter.request import BuildRequest
from gemma_export.exporter.schemes import scheme_for
from gemma_export.runtime.kv_cache import KVCache
from gemma_export.runtime.rolling import RollingCache

LENGTH = 64

SHAPES = st.builds(
    lambda window, chunk, more: RollingCache((0,), window, chunk, window + chunk - 1 + more, 0),
    st.integers(1, 9),
    st.integers(1, 7),
    st.integers(0, 5),
)
ACTIONS = st.lists(
    st.tuples(st.sampled_from(["step", "interrupted", "back"]), st.integers(1, 30)), max_size=8
)


def cache_of(rolling: RollingCache, batch: int = 1) -> KVCache:
    return KVCache.allocate(
        layers=2,
        batch=batch,
        kv_heads=1,
        max_length=LENGTH,
        head_dim=2,
        dtype="float32",
        rolling=rolling,
    )


class Row:
    """A row of a rolling cache, whose slots hold the tokens that were written there: no two are the same."""

    def __init__(self, rolling: RollingCache) -> None:
        self.rolling, self.cache = rolling, cache_of(rolling)
        self.slots: list[int | None] = [None] * rolling.slots
        self.text: list[int] = []
        self._tokens = count()

    def step(self, size: int, *, advance: bool) -> None:
        """Runs new tokens as the graph does, and looks at what each query sees."""
        size = min(size, LENGTH - len(self.text), size if advance else self.rolling.chunk)
        if size == 0:
            return
        start = len(self.text)
        text = [*self.text, *(next(self._tokens) for _ in range(size))]
        for part in self.cache.begin(np.arange(start, start + size)[None]):
            positions = torch.arange(start + part.start, start + part.stop)[None]
            written = written_slots(positions, self.rolling)[0].tolist()
            assert max(written) < self.rolling.slots
            for position, slot in zip(positions[0].tolist(), written, strict=True):
                self.slots[slot] = text[position]
            mask = rolling_mask(positions, self.rolling.slots, self.rolling.window)[0, 0].numpy()
            for position, row in zip(positions[0].tolist(), mask, strict=True):
                seen = [self.slots[slot] for slot in np.flatnonzero(row == 0)]
                expected = text[max(0, position - self.rolling.window + 1) : position + 1]
                assert sorted(seen) == sorted(expected)
        if advance:
            self.text = text
            self.cache.advance(size)

    def back(self, count: int) -> None:
        """Forgets some tokens at the end, and all where the cache cannot go on from there."""
        length = self.cache.reusable(max(0, len(self.text) - count))
        self.cache.truncate(length)
        del self.text[length:]


@settings(max_examples=50, deadline=None)  # A sequence is up to 64 steps of PyTorch's.
@given(SHAPES, ACTIONS)
def test_every_query_sees_its_window(rolling: RollingCache, actions: list[tuple[str, int]]) -> None:
    row = Row(rolling)
    for action, size in actions:
        if action == "back":
            row.back(size)
        else:
            row.step(size, advance=action == "step")
        assert row.cache.length == len(row.text)


@settings(deadline=None)
@given(SHAPES, st.integers(1, LENGTH), st.data())
def test_what_can_be_gone_back_to(rolling: RollingCache, written: int, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, written))
    held = range(max(0, written - rolling.slots), written)
    needed = range(max(0, start - rolling.window + 1), start)
    whole = all(position in held for position in needed)
    can = bool(rolling.can_go_on(np.array([start]), np.array([written]))[0])
    assert whole or not can
    if rolling.window > 1:  # A token that sees itself alone could always go on, and need not.
        assert can == whole


@settings(deadline=None)
@given(SHAPES, st.lists(st.integers(0, LENGTH), min_size=1, max_size=4), st.integers(1, 40))
def test_no_part_of_a_step_is_too_long_or_wraps(
    rolling: RollingCache, starts: list[int], tokens: int
) -> None:
    parts = rolling.parts(np.array(starts), tokens)
    assert [i for part in parts for i in range(part.start, part.stop)] == list(range(tokens))
    for part in parts:
        assert part.stop - part.start <= rolling.chunk
        for start in starts:
            slots = [(start + i) % rolling.slots for i in range(part.start, part.stop)]
            assert slots == list(range(slots[0], slots[0] + len(slots)))


@settings(deadline=None)
@given(SHAPES, st.integers(0, LENGTH), st.integers(1, 20))
def test_a_step_that_is_too_long_has_no_slots(rolling: RollingCache, start: int, tokens: int) -> None:
    slots = written_slots(torch.arange(start, start + tokens)[None], rolling)
    assert bool((slots >= rolling.slots).all()) == (tokens > rolling.chunk)


def test_rows_go_on_alone() -> None:
    rolling = RollingCache((0,), window=4, chunk=3, slots=6, saved_per_row=0)
    cache = cache_of(rolling, batch=2)
    cache.row(0).begin(np.arange(20)[None])
    cache.row(0).advance(20)
    cache.row(1).begin(np.arange(5)[None])
    cache.row(1).advance(5)
    assert [cache.reusable(length) for length in (5, 4, 2, 0)] == [0, 0, 0, 0]
    assert [cache.row(1).reusable(length) for length in (5, 4, 2, 0)] == [5, 4, 2, 0]
    assert [cache.row(0).reusable(length) for length in (21, 20, 17, 16)] == [0, 20, 17, 0]
    with pytest.raises(OverwrittenError, match="A row of 20 tokens cannot go back to its first 16"):
        cache.row(0).truncate(16)
    with pytest.raises(OverwrittenError, match="--local-cache full"):
        cache.row(0).begin(np.array([[15, 16]]))
    cache.row(0).truncate(17)
    assert cache.lengths.tolist() == [17, 5]
    cache.row(0).begin(np.array([[0]]))  # From the beginning there is nothing to be lost.
    assert cache.begin(np.array([[0, 1], [5, 6]])) == [slice(0, 1), slice(1, 2)]


def test_a_layer_that_rolls_gives_its_last_positions() -> None:
    rolling = RollingCache((0,), window=4, chunk=3, slots=6, saved_per_row=0)
    cache = cache_of(rolling)
    for position in range(8):
        cache.key_buffers[0][0, 0, position % 6] = position
        cache.key_buffers[1][0, 0, position] = position
    cache.begin(np.arange(8)[None])
    cache.advance(8)
    assert [cache.key_buffers[i].shape[2] for i in (0, 1)] == [6, LENGTH]
    assert (cache.positions(0), cache.positions(1)) == (range(2, 8), range(8))
    np.testing.assert_array_equal(cache.keys(0)[0, 0, :, 0], range(2, 8))
    np.testing.assert_array_equal(cache.keys(1)[0, 0, :, 0], range(8))
    cache.truncate(6)
    assert (cache.positions(0), cache.positions(1)) == (range(2, 6), range(6))
    np.testing.assert_array_equal(cache.keys(0)[0, 0, :, 0], range(2, 6))


def test_a_released_model_saves_what_its_local_layers_do_not_keep() -> None:
    config = preset("gemma2-27b")
    rolling = rolling_cache(config, 8192, 512, 2)
    assert rolling.layers == tuple(range(0, 46, 2))
    # 4096 + 512 - 1 tokens, in whole chunks.
    assert (rolling.window, rolling.chunk, rolling.slots) == (4096, 512, 4608)
    per_slot = 2 * 16 * 128 * 2  # Keys and values of 16 heads of 128 halves.
    assert rolling.saved_per_row == 23 * (8192 - 4608) * per_slot
    assert rolling_cache(config, 8192, 100, 2).slots == 4200


def test_an_engine_needs_less_memory_by_what_it_saves() -> None:
    config = preset("gemma2-27b")
    rolling = rolling_cache(config, 8192, 512, 2)
    full = MemoryPlan(config, "rtx", "fp16", scheme_for("rtx", "fp16"), slots=8192, rows=3)
    assert full.cache - replace(full, rolling=rolling).cache == 3 * rolling.saved_per_row


def test_a_cache_that_would_be_no_shorter_is_refused() -> None:
    config = preset("gemma2-2b")
    with pytest.raises(UsageError, match=r"saves nothing here.*take 4,608 slots, and a row has.* 4,608"):
        rolling_cache(config, 4608, 512, 2)
    with pytest.raises(UsageError, match="No cache of gemma-2b can roll"):
        rolling_cache(preset("2b"), 8192, 512, 2)


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_a_target_that_counts_slots_is_refused(target: str) -> None:
    precision = "fp32" if target == "cpu" else "fp16"
    with pytest.raises(UsageError, match=r"whose attention counts slots.*--target onnx, rtx or tensorrt"):
        BuildRequest(size="gemma2-2b", target=target, precision=precision, local_cache="rolling")


@pytest.mark.parametrize(
    ("max_length", "chunk"),
    [(8192, 512), (5000, 512), (None, 512)],
    ids=["longest", "shorter", "the model's"],
)
def test_a_request_says_what_rolls(max_length: int | None, chunk: int) -> None:
    config = preset("gemma2-2b")
    request = BuildRequest(
        size="gemma2-2b", target="onnx", precision="fp16", max_length=max_length, local_cache="rolling"
    )
    rolling = request.rolling_cache(config)
    assert rolling is not None
    assert (rolling.chunk, rolling.slots) == (chunk, 4608)
    assert BuildRequest(size="gemma2-2b", target="onnx").rolling_cache(config) is None


def test_a_small_window_has_small_steps(small: GemmaConfig) -> None:
    request = BuildRequest(size="gemma2-2b", target="onnx", local_cache="rolling", max_length=512)
    rolling = request.rolling_cache(small)
    assert rolling is not None
    assert (rolling.window, rolling.chunk, rolling.slots) == (64, 64, 128)


@pytest.fixture
def small() -> GemmaConfig:
    return GemmaConfig(
        name="gemma-small",
        vocab_size=96,
        hidden_size=32,
        num_layers=2,
        num_query_heads=4,
        num_kv_heads=1,
        head_dim=16,
        intermediate_size=48,
        context_length=512,
        layer_kinds=("local", "global"),
        sliding_window=64,
    )
