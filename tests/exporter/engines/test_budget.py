"""What fits a device, said before anything is built."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from gemma_export.errors import UsageError
from gemma_export.exporter import pipeline
from gemma_export.exporter.config import preset
from gemma_export.exporter.engines.budget import MemoryPlan, check_memory, devices_for
from gemma_export.exporter.engines.devices import DEVICES, GIB, device_named
from gemma_export.exporter.engines.options import EngineOptions
from gemma_export.exporter.engines.request import rtx_compiles
from gemma_export.exporter.request import BuildRequest
from gemma_export.exporter.schemes import scheme_for


def plan(
    size: str,
    precision: str,
    slots: int = 8192,
    rows: int = 1,
    target: str = "rtx",
    sms: tuple[int, ...] = (),
) -> MemoryPlan:
    scheme, config = scheme_for(target, precision), preset(size)
    capped = config.attention_softcap is not None
    chunk = min(512, slots)
    return MemoryPlan(config, target, precision, scheme, slots, rows, chunk, decomposed=capped, sms=sms)


def refusal(plan: MemoryPlan, device: str | None = None, memory: int | None = None) -> UsageError:
    with pytest.raises(UsageError) as refused:
        check_memory(plan, None if device is None else device_named(device), memory)
    return refused.value


@pytest.mark.parametrize("precision", ["fp16", "bf16", "int8", "int4"])
@pytest.mark.usefixtures("traced_once")
def test_weights_are_those_that_a_build_writes(precision: str, tmp_path: Path) -> None:
    quantized = precision.startswith("int")
    request = BuildRequest(
        size="tiny",
        target="onnx",
        precision=precision,
        no_calibration=quantized,
        max_length=256,
        parity="none",
        output=tmp_path / "b",
    )
    manifest = pipeline.build(request).manifest
    expected = plan("tiny", precision, 256, target="onnx")
    # Scales have 2 or 4 bytes, and constants some: together less than 1 % of the smallest of models.
    assert expected.weights == pytest.approx(manifest.bytes.weights, rel=0.01)
    assert expected.cache == manifest.bytes.cache_per_row


def test_cache_follows_from_the_shape() -> None:
    # 2 tensors · layers · KV heads · slots · head_dim · 2 bytes
    assert plan("2b", "int8").cache == 2 * 18 * 1 * 8192 * 256 * 2
    assert plan("7b", "int8", 4096, rows=3).cache == 3 * 2 * 28 * 16 * 4096 * 256 * 2


def test_activations_grow_with_the_chunk_the_rows_and_the_logits() -> None:
    small = replace(plan("2b", "int8"), chunk=16)
    assert small.activations < replace(small, chunk=512).activations
    assert small.activations < replace(small, rows=64).activations
    all_logits = replace(small, all_logits=True)
    assert all_logits.activations - small.activations == 15 * 256_000 * 6


@pytest.mark.parametrize(
    ("size", "precision", "device"),
    [
        ("2b", "int4", "orin-nano-4gb"),
        ("2b", "int8", "orin-nano-8gb"),
        ("2b", "int8", "rtx-4060"),
        ("7b", "int4", "orin-nx-16gb"),
        ("7b", "fp16", "rtx-4090"),
    ],
)
def test_what_fits_is_let_through(size: str, precision: str, device: str) -> None:
    check_memory(plan(size, precision), device_named(device), None)


def test_without_a_device_there_is_no_budget() -> None:
    check_memory(plan("7b", "fp16", rows=100), None, None)


@pytest.mark.parametrize(
    ("asked", "device", "memory"),
    [
        (plan("7b", "int8", target="tensorrt"), "orin-nano-8gb", None),
        (plan("2b", "fp16", target="tensorrt"), "orin-nano-4gb", None),
        (plan("7b", "int4"), "rtx-4060", None),
        (plan("7b", "int8", rows=4), None, 12 * GIB),
        (plan("2b", "fp16", rows=8), None, 5 * GIB),
        (plan("2b", "fp16", sms=(75,)), None, 4 * GIB),
        (plan("7b", "fp16", sms=(75, 89)), "t4", None),
        (plan("gemma2-9b", "int4"), None, 31 * GIB // 4),
    ],
    ids=[
        "7b int8 on Orin Nano",
        "2b fp16 on 4 GB",
        "7b int4 on a 4060",
        "four rows",
        "eight rows",
        "2b fp16 on Turing",
        "7b fp16 on a T4",
        "scores of Gemma 2",
    ],
)
def test_what_does_not_fit_is_refused_with_what_would(
    asked: MemoryPlan, device: str | None, memory: int | None
) -> None:
    error = refusal(asked, device, memory)
    assert error.exit_code == 2
    assert all(word in error.message for word in ("weights", "cache", "activations"))
    offers = error.hint.removeprefix("A build that would fit has ").removesuffix(".").split(", or ")
    assert offers[0].startswith("--")
    for offer in offers:  # Each of them is taken at its word.
        given = dict(re.findall(r"--([a-z-]+) (\w+)", offer))
        precision = given.get("precision", asked.precision)
        slots = int(given.get("max-length", asked.slots))
        fitting = replace(
            asked,
            precision=precision,
            scheme=scheme_for(asked.target, precision),
            slots=slots,
            chunk=min(int(given.get("prefill-chunk", asked.chunk)), slots),
            rows=int(given.get("max-batch", asked.rows)),
        )
        check_memory(fitting, None if device is None else device_named(device), memory)
        assert all(rtx_compiles(precision, sm) for sm in asked.sms)


def test_scores_with_a_soft_cap_are_in_memory() -> None:
    # 6 bytes a score: 8 heads x 512 tokens x 8192 slots of one layer, and nothing like it without a cap.
    capped = plan("gemma2-2b", "int8")
    assert capped.activations > 8 * 512 * 8192 * 6
    assert replace(capped, decomposed=False).activations < capped.activations / 2
    # A token has as many as there are slots, and the caches are read where they lie.
    assert replace(capped, chunk=1).activations < 32 << 20


def test_a_shorter_prefill_chunk_is_offered_where_scores_are_too_many() -> None:
    asked = plan("gemma2-2b", "int8")
    error = refusal(asked, memory=asked.total - 1)
    assert "--prefill-chunk 256" in error.hint
    check_memory(replace(asked, chunk=256), None, asked.total - 1)


def test_a_longer_cache_than_the_one_offered_does_not_fit() -> None:
    asked, memory = plan("7b", "int8"), 10 * GIB
    offered = re.search(r"--max-length (\d+)", refusal(asked, memory=memory).hint)
    assert offered is not None
    slots = int(offered.group(1))
    check_memory(replace(asked, slots=slots), None, memory)
    refusal(replace(asked, slots=slots + 64), memory=memory)


def test_where_nothing_fits_a_device_is_named() -> None:
    error = refusal(plan("7b", "int8"), memory=2 * GIB)
    assert "Nothing of gemma-7b fits there: --precision int4 needs" in error.hint
    named = error.hint.split("which ")[1].removesuffix(" has.")
    assert rtx_compiles("int4", DEVICES[named].sm)
    error = refusal(plan("7b", "int8", sms=(75,)), memory=2 * GIB)
    assert "--precision int8 needs" in error.hint  # Turing runs nothing smaller.


def test_memory_takes_the_place_of_what_a_device_leaves() -> None:
    asked = plan("2b", "int8")
    check_memory(asked, device_named("orin-nano-8gb"), None)
    error = refusal(asked, "orin-nano-8gb", 1 * GIB)
    assert "--memory gives it 1.00 GiB" in error.message


def test_a_system_keeps_its_share() -> None:
    for device in DEVICES.values():
        assert 0 < device.reserved < device.memory / 2
        assert device.available + device.reserved == device.memory
    # What CPU and GPU share has room for less than a card with as much.
    assert device_named("orin-nano-8gb").available < device_named("rtx-4060").available


def test_devices_that_something_fits_on() -> None:
    names = [device.name for device in devices_for(20 * GIB, (86, 89))]
    assert names == ["rtx-3090", "rtx-4090", "a10", "l4"]
    assert devices_for(100 * GIB) == ()


@pytest.mark.usefixtures("traced_once")
def test_budget_comes_before_anything_is_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "new_bundle", lambda *arguments, **options: pytest.fail("built"))
    request = BuildRequest(
        size="2b",
        random_weights=True,
        target="rtx",
        precision="fp16",
        engines=EngineOptions(memory=4 * GIB),
        output=tmp_path / "b",
    )
    with pytest.raises(UsageError, match="gemma-2b in fp16 needs"):
        pipeline.build(request)
    assert list(tmp_path.iterdir()) == []
