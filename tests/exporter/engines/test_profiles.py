"""Profiles as data, and as arguments of `trtexec`."""

import shlex
from pathlib import Path

from support.engine_graphs import SLOTS, Written

from gemma_export.exporter.engines.engine_graph import read_graph
from gemma_export.exporter.engines.profiles import decoder_inputs, profiles_for, trtexec_command
from gemma_export.exporter.engines.request import EngineRequest


def test_one_row_alone_has_two_profiles_and_more_rows_a_third() -> None:
    assert [p.name for p in profiles_for(EngineRequest("rtx"), 512)] == ["prefill", "decode"]
    prefill, decode, batch = profiles_for(EngineRequest("rtx", max_batch=3, prefill_chunk=16), 512)
    assert prefill.shapes(("B", "T")) == ((1, 1), (1, 16), (1, 16))
    assert decode.shapes(("B", "T")) == ((1, 1), (1, 1), (1, 1))
    assert batch.shapes(("B", "T")) == ((2, 1), (3, 1), (3, 1))
    assert batch.shapes(("B", 1, 512, 128)) == ((2, 1, 512, 128), (3, 1, 512, 128), (3, 1, 512, 128))


def test_a_models_inputs_are_those_of_its_graph(engine_graph) -> None:  # type: ignore[no-untyped-def]
    graph: Written = engine_graph("fp16")
    found = read_graph(graph.file).inputs
    expected = decoder_inputs([SLOTS, SLOTS], 1, 128, "float16")
    free = [tuple(size if isinstance(size, int) else "free" for size in spec.shape) for spec in found]
    assert [spec.name for spec in found] == [spec.name for spec in expected]
    assert free == [tuple(s if isinstance(s, int) else "free" for s in spec.shape) for spec in expected]
    profile = profiles_for(EngineRequest("rtx", max_batch=2, prefill_chunk=8), SLOTS)[2]
    assert [profile.shapes(spec.shape) for spec in found] == [profile.shapes(s.shape) for s in expected]


def test_trtexec_gets_every_input_of_every_profile() -> None:
    inputs = decoder_inputs([32], 2, 4, "float16")
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
