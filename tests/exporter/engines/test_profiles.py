"""Profiles as data, and as arguments of `trtexec`."""

import shlex
from pathlib import Path

from gemma_export.exporter.engines.profiles import profiles_for, trtexec_command
from gemma_export.exporter.engines.request import EngineRequest
from gemma_export.runtime.manifest import TensorSpec


def test_one_row_alone_has_two_profiles_and_more_rows_a_third() -> None:
    assert [p.name for p in profiles_for(EngineRequest("rtx"), 512)] == ["prefill", "decode"]
    prefill, decode, batch = profiles_for(EngineRequest("rtx", max_batch=3, prefill_chunk=16), 512)
    assert prefill.shapes(("B", "T")) == ((1, 1), (1, 16), (1, 16))
    assert decode.shapes(("B", "T")) == ((1, 1), (1, 1), (1, 1))
    assert batch.shapes(("B", "T")) == ((2, 1), (3, 1), (3, 1))
    assert batch.shapes(("B", 1, 512, 128)) == ((2, 1, 512, 128), (3, 1, 512, 128), (3, 1, 512, 128))


def test_trtexec_gets_every_input_of_every_profile() -> None:
    ids = [TensorSpec(name, "int64", ("B", "T")) for name in ("input_ids", "position_ids")]
    names = [f"past_key_values.0.{part}" for part in ("key", "value")]
    inputs = [*ids, *(TensorSpec(name, "float16", ("B", 2, 32, 4)) for name in names)]
    profiles = profiles_for(EngineRequest("tensorrt", max_batch=2, prefill_chunk=8), 32)
    command = trtexec_command(Path("my model.onnx"), inputs, profiles, Path("model.engine"))
    words = shlex.split(command)
    assert words[:5] == [
        "trtexec",
        "--onnx=my model.onnx",
        "--saveEngine=model.engine",
        "--stronglyTyped",
        "--skipInference",
    ]
    cache = "past_key_values.0.{}:{}x2x32x4"

    def shapes(rows: int, tokens: int) -> str:
        ids = f"input_ids:{rows}x{tokens},position_ids:{rows}x{tokens}"
        return ",".join([ids, cache.format("key", rows), cache.format("value", rows)])

    assert words[5:] == [
        word
        for index, (least, best, most) in enumerate(
            [((1, 1), (1, 8), (1, 8)), ((1, 1), (1, 1), (1, 1)), ((2, 1), (2, 1), (2, 1))]
        )
        for word in (
            f"--profile={index}",
            f"--minShapes={shapes(*least)}",
            f"--optShapes={shapes(*best)}",
            f"--maxShapes={shapes(*most)}",
        )
    ]
