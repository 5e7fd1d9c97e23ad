"""What can go wrong while a plan is compiled and written: it is a sentence, and nothing is left."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir
import pytest
from support.disk import largest_file
from support.engine_graphs import Written

from gemma_export.errors import EngineError, StorageError
from gemma_export.exporter import events

EngineGraphs = Callable[..., Written]


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "engines").iterdir())


def test_a_full_disk_leaves_no_part_of_an_engine(engine_graph: EngineGraphs, tmp_path: Path) -> None:
    graph = engine_graph("w8a16")
    with largest_file(1 << 20), pytest.raises(StorageError, match="takes no more"):
        graph.build(tmp_path, 89)
    assert left(tmp_path) == []
    graph.build(tmp_path, 89)
    assert left(tmp_path) == ["rtx-sm89.engine"]


def test_a_graph_that_is_no_onnx_is_a_sentence(engine_graph: EngineGraphs, tmp_path: Path) -> None:
    graph = engine_graph("fp16")
    for name, content in (
        ("empty", b""),
        ("text", b"no graph at all"),
        ("cut", graph.file.read_bytes()[:999]),
    ):
        file = graph.file.with_name(f"{name}.onnx")
        file.write_bytes(content)
        with pytest.raises(EngineError, match=f"{name}.onnx is (no ONNX file|not a decoder's graph)"):
            Written(file, graph.layers, graph.weights).build(tmp_path, 89)


def test_the_parsers_own_words_are_told(engine_graph: EngineGraphs, tmp_path: Path) -> None:
    def unknown(graph: ir.Graph) -> None:
        node = next(node for node in graph if node.op_type == "Gelu")
        node.domain, node.op_type = "com.example", "Quack"

    with pytest.raises(EngineError, match=r"does not take unknown\.onnx: .*Quack"):
        engine_graph("fp16").changed("unknown", unknown).build(tmp_path, 89)
    assert left(tmp_path) == []


def test_weights_that_are_missing_are_told(engine_graph: EngineGraphs, tmp_path: Path) -> None:
    graph = engine_graph("fp16")
    alone = tmp_path / "model.onnx"
    alone.write_bytes(graph.file.read_bytes())
    with pytest.raises(EngineError, match=r"does not take model\.onnx"):
        Written(alone, graph.layers, graph.weights).build(tmp_path, 89)
    assert left(tmp_path) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_build(engine_graph: EngineGraphs, tmp_path: Path, number: signal.Signals) -> None:
    """The handler that was there is called when TensorRT has stopped; afterwards it is there again."""
    seen: list[list[str]] = []

    class StoppedError(Exception):
        pass

    def handler(*of_signal: object) -> None:
        seen.append(left(tmp_path))
        raise StoppedError

    def listener(event: events.Event) -> None:
        if isinstance(event, events.StageProgress):
            os.kill(os.getpid(), number)

    before = signal.signal(number, handler)
    try:
        with pytest.raises(StoppedError):
            engine_graph("fp16").build(tmp_path, 89, listener=listener)
        assert signal.getsignal(number) is handler
    finally:
        signal.signal(number, before)
    assert seen == [[".rtx-sm89.engine.partial"]]
    assert left(tmp_path) == []


def test_what_a_listener_raises_is_raised(engine_graph: EngineGraphs, tmp_path: Path) -> None:
    def listener(event: events.Event) -> None:
        if isinstance(event, events.StageProgress):
            raise BrokenPipeError("nobody reads")

    with pytest.raises(BrokenPipeError, match="nobody reads"):
        engine_graph("fp16").build(tmp_path, 89, listener=listener)
    assert left(tmp_path) == []


def test_an_engine_that_is_not_what_was_asked_for_is_not_kept(
    engine_graph: EngineGraphs, tmp_path: Path
) -> None:
    graph = engine_graph("fp16")
    with pytest.raises(EngineError, match="some are stored twice"):
        Written(graph.file, graph.layers, graph.weights // 2).build(tmp_path, 89)
    assert left(tmp_path) == []
