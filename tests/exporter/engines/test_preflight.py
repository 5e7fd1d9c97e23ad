"""Before a build compiles engines: what this machine cannot do is said at once, with the ways out."""

import sys
from pathlib import Path

import pytest
from support.command_line import Invoke, assert_refused
from support.folders import only

from gemma_export.errors import EngineError
from gemma_export.exporter.engines import preflight
from gemma_export.exporter.engines.request import EngineRequest


def test_a_build_without_tensorrt_names_the_ways_out(
    invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    request = ["build", "--size", "tiny", "--target", "tensorrt", "--precision", "int8"]
    outcome = invoke([*request, "-o", tmp_path / "b", "-q"])
    assert_refused(outcome, 1, "TensorRT is not installed")
    hint = outcome.err.splitlines()[-1]
    assert "gemma-export[gpu]" in hint
    assert "--target rtx" in hint
    assert "gemma-export compile BUNDLE --target tensorrt" in hint
    assert "trtexec" not in hint  # It takes a graph, and there is none.
    only(tmp_path)


@pytest.mark.parametrize("command", [None, "trtexec --onnx=model.onnx"], ids=["build", "compile"])
def test_a_machine_without_a_gpu_is_told_the_command_where_there_is_a_graph(
    command: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none_there() -> int:
        raise EngineError("There is no GPU.", "Take --target rtx.")

    monkeypatch.setattr(preflight, "load_compiler", lambda *arguments: None)
    monkeypatch.setattr(preflight, "device_sm", none_there)
    with pytest.raises(EngineError) as refused:
        preflight.check_compiler(EngineRequest("tensorrt"), command)
    assert refused.value.hint.startswith("Take --target rtx.")
    assert refused.value.hint.endswith("Take --target rtx." if command is None else command)
