"""What can be said about engines, and what is refused with a way out."""

from typing import Any

import pytest

from gemma_export.errors import UsageError
from gemma_export.exporter.config import preset
from gemma_export.exporter.engines.options import EngineOptions, read_memory, read_sms
from gemma_export.exporter.engines.request import RTX_SMS, EngineRequest, engine_files
from gemma_export.exporter.request import BuildRequest

RTX: dict[str, Any] = {"size": "2b", "target": "rtx", "precision": "int8"}


def on(**options: Any) -> EngineOptions:
    return EngineOptions(**options)


@pytest.mark.parametrize(
    ("typed", "sms"),
    [
        (None, ()),
        (["89"], (89,)),
        (["8.9", "sm_86"], (86, 89)),
        (["120,75", "SM75"], (75, 120)),
        (["12.0"], (120,)),
    ],
    ids=str,
)
def test_compute_capabilities_as_they_are_typed(typed: list[str] | None, sms: tuple[int, ...]) -> None:
    assert read_sms(typed) == sms


@pytest.mark.parametrize("typed", ["", "ada", "8.9.1", "9", "-89", "89,", "8,9"])
def test_what_is_no_compute_capability(typed: str) -> None:
    with pytest.raises(UsageError, match="is no compute capability"):
        read_sms([typed])


@pytest.mark.parametrize(
    ("typed", "count"),
    [(None, None), ("8GiB", 8 << 30), ("8 gib", 8 << 30), ("7.5GB", 7_500_000_000), ("512MiB", 512 << 20)],
    ids=str,
)
def test_memory_as_it_is_typed(typed: str | None, count: int | None) -> None:
    assert read_memory(typed) == count


@pytest.mark.parametrize("typed", ["", "much", "8 TB", "-1GiB", "8GiB8", "GiB"])
def test_what_is_no_amount_of_memory(typed: str) -> None:
    with pytest.raises(UsageError, match="no amount of memory"):
        read_memory(typed)


@pytest.mark.parametrize(
    ("values", "message", "hint"),
    [
        # Where nothing is compiled
        ({"target": "cpu", "engines": on(sms=(89,))}, "--sm is about engines", "--target rtx"),
        ({"target": "onnx", "engines": on(max_batch=2)}, "--max-batch is about engines", "--target rtx"),
        ({"target": "cuda", "engines": on(prefill_chunk=9)}, "--prefill-chunk is about", "--target rtx"),
        ({"target": "cpu", "engines": on(device="t4")}, "--device is about engines", "Leave --device out"),
        ({"target": "onnx", "engines": on(memory=1)}, "--memory is about engines", "Leave --memory out"),
        # GPUs
        ({"engines": on(sms=(87,))}, "does not compile for SM 87", "75, 80, 86, 89, 120, 121"),
        ({"engines": on(sms=(90,))}, "does not compile for SM 90", "--target tensorrt"),
        ({"precision": "bf16", "engines": on(sms=(75,))}, "SM 75 does not run bf16", "int8 or fp16"),
        ({"precision": "int4", "engines": on(sms=(75, 89))}, "SM 75 does not run int4", "int8 or fp16"),
        ({"precision": "int4", "engines": on(device="t4")}, "SM 75 does not run int4", "int8 or fp16"),
        ({"engines": on(device="orin-nx-16gb")}, "orin-nx-16gb, which is SM 87", "--target tensorrt"),
        ({"engines": on(device="rtx-4060", sms=(86,))}, "rtx-4060 is SM 89", "add --sm 89"),
        ({"target": "tensorrt", "engines": on(sms=(87,))}, "--sm is for --target rtx", "Leave --sm out"),
        # A cache
        ({"max_length": 256, "engines": on(prefill_chunk=257)}, "--prefill-chunk 257 is more", "at most 256"),
        # What no graph can keep
        ({"precision": "fp32"}, "'fp32' cannot be built for the target rtx", "fp16, bf16, int8, int4"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, dict) else "",
)
def test_impossible_engines(values: dict[str, Any], message: str, hint: str) -> None:
    with pytest.raises(UsageError) as refused:
        BuildRequest(**RTX | values)
    assert message in refused.value.message
    assert hint in refused.value.hint


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_batch": 0}, "--max-batch 0"),
        ({"prefill_chunk": 0}, "--prefill-chunk 0"),
        ({"memory": 0}, "no room"),
        ({"device": "toaster"}, "no device 'toaster'"),
    ],
    ids=str,
)
def test_impossible_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as refused:
        EngineOptions(**options)
    assert message in refused.value.message
    assert refused.value.hint


@pytest.mark.parametrize("sm", RTX_SMS)
@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_every_gpu_runs_fp16_and_int8(sm: int, precision: str) -> None:
    BuildRequest(**RTX | {"precision": precision, "engines": on(sms=(sm,))})


def test_options_become_a_request() -> None:
    config = preset("2b")
    engines = on(sms=(86, 89), max_batch=4, prefill_chunk=128)
    assert BuildRequest(**RTX, engines=engines).engine_request(config) == EngineRequest(
        "rtx", (86, 89), 4, 128
    )
    assert BuildRequest(**RTX).engine_request(config) == EngineRequest("rtx", (), 1, 512)
    short = BuildRequest(**RTX, max_length=100, engines=on(device="rtx-4060"))
    assert short.engine_request(config) == EngineRequest("rtx", (89,), 1, 100)
    jetson = BuildRequest(**RTX | {"target": "tensorrt"}, engines=on(device="orin-nano-8gb"))
    assert jetson.engine_request(config) == EngineRequest("tensorrt", (), 1, 512)
    assert BuildRequest(size="2b").engine_request(config) is None


def test_chunk_is_held_against_a_models_own_context() -> None:
    request = BuildRequest(**RTX, engines=on(prefill_chunk=9000))
    with pytest.raises(UsageError, match="--prefill-chunk 9000 is more than the 8192 tokens"):
        request.engine_request(preset("2b"))


@pytest.mark.parametrize(("sms", "count"), [((), 1), ((75,), 1), ((86, 89), 1), ((75, 89), 2)], ids=str)
def test_sm_75_has_an_engine_of_its_own(sms: tuple[int, ...], count: int) -> None:
    assert engine_files(EngineRequest("rtx", sms)) == count


@pytest.mark.parametrize("size", ["gemma2-2b", "gemma2-9b", "gemma2-27b"])
@pytest.mark.parametrize("target", ["rtx", "tensorrt"])
@pytest.mark.parametrize("precision", ["fp16", "bf16", "int8", "int4"])
def test_what_is_built_of_gemma_1_is_built_of_gemma_2(size: str, target: str, precision: str) -> None:
    request = BuildRequest(size=size, target=target, precision=precision)
    assert request.engine_request(preset(size)) == EngineRequest(target, (), 1, 512)  # type: ignore[arg-type]
