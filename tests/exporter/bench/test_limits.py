"""The least time that a machine needs, worked out by hand."""

from dataclasses import replace

import pytest
from support.small_bundle import Shape, manifest

from gemma_export.exporter.bench.limits import (
    attention_operations,
    bytes_per_token,
    decode_seconds,
    prefill_seconds,
    product_operations,
)
from gemma_export.exporter.bench.values import Machine, Timing
from gemma_export.runtime.manifest import ByteCounts, Manifest, ParameterCounts
from gemma_export.runtime.rolling import RollingCache

MACHINE = Machine(read=1e6, read_by="hand", floats=1e6, integers=1e9)


@pytest.fixture
def small() -> Manifest:
    """2 layers of 32 with 4 heads of 16; 64 slots of 10 bytes in each layer."""
    import json

    read = Manifest.from_json(json.dumps({**manifest(Shape(logits="last")), "files": {}}))
    model = replace(read.model, parameters=ParameterCounts(65_536, 20_000))
    return replace(read, model=model, bytes=ByteCounts(90_000, 80_000, 2 * 64 * 10))


def test_a_token_reads_the_weights_and_what_the_cache_holds(small: Manifest) -> None:
    assert bytes_per_token(small, 0) == 80_000
    assert bytes_per_token(small, 64) == 80_000 + 2 * 64 * 10
    assert bytes_per_token(small, 7.5) == 80_000 + 2 * 7.5 * 10


def test_a_rolling_layer_reads_its_window_only(small: Manifest) -> None:
    rolling = RollingCache(layers=(0,), window=8, chunk=9, slots=16, saved_per_row=48 * 10)
    rolled = replace(
        small,
        graph=replace(small.graph, rolling=rolling),
        bytes=replace(small.bytes, cache_per_row=(16 + 64) * 10),
    )
    assert bytes_per_token(rolled, 6) == bytes_per_token(small, 6)
    assert bytes_per_token(rolled, 40) == 80_000 + (8 + 40) * 10


def test_decoding_is_reading(small: Manifest) -> None:
    # At depth 10, three tokens see 11, 12 and 13 slots.
    wanted = sum(80_000 + 2 * slots * 10 for slots in (11, 12, 13)) / 1e6
    assert decode_seconds(small, Timing(10, 3, 99.0), MACHINE.read) == pytest.approx(wanted, rel=1e-12)
    beside = Timing(10, 3, 99.0, read=2 * MACHINE.read)
    assert decode_seconds(small, beside, MACHINE.read) == pytest.approx(wanted / 2, rel=1e-12)


def test_operations_of_a_prompt(small: Manifest) -> None:
    head = 2048 * 32
    assert product_operations(small, 5) == 2 * (5 * 20_000 + head)
    every = replace(small, graph=replace(small.graph, logits="all"))
    assert product_operations(every, 5) == 2 * 5 * (20_000 + head)
    # Queries see 1, 2 and 3 keys, and as many values.
    assert attention_operations(small, 3) == 2 * 2 * 2 * 4 * 16 * (1 + 2 + 3)


def test_a_prompt_is_arithmetic_or_reading_whichever_is_longer(small: Manifest) -> None:
    prompt = Timing(20, 20, 99.0)
    floats = (product_operations(small, 20) + attention_operations(small, 20)) / 1e6
    assert prefill_seconds(small, MACHINE, prompt, chunk=8) == pytest.approx(floats, rel=1e-12)
    slow = replace(MACHINE, read=1e3)
    assert prefill_seconds(small, slow, prompt, chunk=8) == pytest.approx(3 * 80, rel=1e-12)
    codes = replace(small, storage_dtype="int8")
    integers = product_operations(small, 20) / 1e9 + attention_operations(small, 20) / 1e6
    fast = replace(MACHINE, read=1e12)
    assert prefill_seconds(codes, fast, prompt, chunk=8) == pytest.approx(integers, rel=1e-12)


def test_without_a_rate_of_matrices_there_is_no_limit(small: Manifest) -> None:
    unknown = replace(MACHINE, floats=None, integers=None)
    assert prefill_seconds(small, unknown, Timing(4, 4, 1.0), chunk=8) is None
