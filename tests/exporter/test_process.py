"""The command as a process: streams that end or refuse, signals, defects, and the exit codes of all that."""

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest
from support.command_line import Invoke, Outcome, RunCli, assert_refused, command, outcome_of
from support.folders import names

from gemma_export.exporter import process


def test_defect_is_said_without_a_traceback(run_cli: RunCli, tiny_bundle: Path) -> None:
    prelude = "from gemma_export.runtime import bundle; bundle.open_bundle = None"
    ended = run_cli(["verify", tiny_bundle], prelude=prelude)
    assert ended.returncode == 1
    assert ended.stderr.startswith("defect: TypeError")
    assert "Traceback" not in ended.stderr
    ended = run_cli(["verify", tiny_bundle], prelude=prelude, env={**os.environ, "GEMMA_EXPORT_DEBUG": "1"})
    assert "Traceback" in ended.stderr


@pytest.mark.parametrize("arguments", [["inspect"], ["generate", "Once"]], ids=lambda value: value[0])
def test_reader_that_goes_away(arguments: list[str], tiny_bundle: Path) -> None:
    name, *rest = arguments
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb") as pipe:
        ended = subprocess.run(
            command([name, tiny_bundle, *rest]), stdout=pipe, stderr=subprocess.PIPE, text=True, check=False
        )
    assert (ended.returncode, ended.stderr) == (1, "")


@pytest.mark.parametrize("arguments", [["inspect"], ["generate", "Once"]], ids=lambda value: value[0])
def test_output_on_a_full_disk(arguments: list[str], tiny_bundle: Path) -> None:
    name, *rest = arguments
    with Path("/dev/full").open("wb") as full:
        ended = subprocess.run(
            command([name, tiny_bundle, *rest]), stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert_refused(Outcome(ended.returncode, "", ended.stderr), 1, "No space left on device")
    assert len(ended.stderr.splitlines()) == 2


def test_terminal_that_has_not_our_signs(tiny_bundle: Path, run_cli: RunCli) -> None:
    ended = run_cli(["verify", tiny_bundle], env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert ended.returncode == 0
    assert ended.stdout.startswith("\\u2713 ")


def test_prompt_from_standard_input(tiny_bundle: Path, run_cli: RunCli) -> None:
    arguments = ["generate", tiny_bundle, "-", "--max-new-tokens", "4", "--json"]
    ended = run_cli(arguments, input=b"Once upon a time", text=False)
    assert ended.returncode == 0
    assert len(json.loads(ended.stdout)["tokens"]) == 4
    ended = run_cli(arguments, input=b"caf\xe9", text=False)
    assert_refused(Outcome(ended.returncode, "", ended.stderr.decode()), 2, "not UTF-8: byte 3")


def test_chat_goes_on_after_a_bad_turn(tiny_bundle: Path, run_cli: RunCli) -> None:
    turns = b"caf\xe9\n" + b"word " * 2000 + b"\nHello\n/reset\n\n/exit\n"
    ended = run_cli(["chat", tiny_bundle, "--max-new-tokens", "4"], input=turns, text=False)
    said = ended.stderr.decode()
    assert ended.returncode == 0, said
    assert said.count("error: ") == said.count("hint: ") == 2
    assert "not valid UTF-8" in said
    assert ended.stdout.decode().strip()


def test_path_that_is_not_utf8(run_cli: RunCli) -> None:
    ended = run_cli(["verify", os.fsdecode(b"caf\xe9")])
    assert_refused(outcome_of(ended), 1, r"caf\udce9 is not there")


ENDING = """
import os, signal
import onnx_ir as ir, torch
from gemma_export.exporter import pipeline, screen
from gemma_export.exporter.commands import console
from gemma_export.exporter.events import StageProgress
from gemma_export.graphs.tensors import InMemory, add_initializer

def lower(*arguments):
    # Weights without a graph around them: what is being interrupted is their writing.
    graph = ir.Graph([], [], nodes=[], opset_imports={"": 24}, name="weights")
    add_initializer(graph, "weight", InMemory("weight", torch.zeros(16, 1 << 20)))
    return pipeline._Graph(ir.Model(graph, ir_version=11), {}, ())

class Ending(screen.JsonLines):
    def __call__(self, event):
        super().__call__(event)
        if isinstance(event, StageProgress):
            os.kill(os.getpid(), signal.NUMBER)

pipeline._lower, console.JsonLines = lower, Ending
"""


def end_while_writing(output: Path, number: str, run_cli: RunCli) -> Outcome:
    arguments = ["build", "--size", "tiny", "--json", "-o", output]
    return outcome_of(run_cli(arguments, prelude=ENDING.replace("NUMBER", number)))


@pytest.mark.parametrize(("number", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_interrupted_build(number: str, code: int, tmp_path: Path, run_cli: RunCli) -> None:
    outcome = end_while_writing(tmp_path / "b", number, run_cli)
    assert outcome.events[-1]["stage"] == "weights"
    assert outcome.code == code
    assert outcome.err == "\nInterrupted. A bundle that was not finished is gone.\n"
    assert names(tmp_path) == []


@pytest.mark.usefixtures("traced_once")
def test_killed_build_does_not_stop_the_next(tmp_path: Path, run_cli: RunCli, invoke: Invoke) -> None:
    outcome = end_while_writing(tmp_path / "b", "SIGKILL", run_cli)
    assert outcome.events[-1]["stage"] == "weights"
    assert outcome.code == -signal.SIGKILL
    assert names(tmp_path) == [".b.lock", ".b.partial"]
    assert "model.onnx.data" in names(tmp_path / ".b.partial")
    assert invoke(["build", "--size", "tiny", "-q", "-o", tmp_path / "b", "--parity", "none"]).code == 0
    assert invoke(["verify", tmp_path / "b"]).code == 0
    assert names(tmp_path) == ["b"]


@pytest.mark.slow
def test_ctrl_c_while_tracing(tmp_path: Path) -> None:
    arguments = command(["build", "--size", "tiny", "--json", "-o", tmp_path / "b"])
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if json.loads(line) == {"event": "started", "stage": "trace", "detail": ""}:
                assert names(tmp_path) == [".b.lock", ".b.partial"]
                process.send_signal(signal.SIGINT)
                break
        _, said = process.communicate()
    assert process.returncode == 130
    assert said == "\nInterrupted. A bundle that was not finished is gone.\n"
    assert names(tmp_path) == []


def test_two_builds_into_one_folder(tmp_path: Path, invoke: Invoke) -> None:
    from gemma_export.exporter.bundle import new_bundle

    output = tmp_path / "b"
    with new_bundle(output, force=False) as folder:
        assert_refused(invoke(["build", "--size", "tiny", "-q", "-o", output]), 2, "Another build is writing")
        (folder / "manifest.json").write_text("{}")
    assert names(tmp_path) == ["b"]


@pytest.mark.parametrize(
    "end", [SystemExit(143), SystemExit(129), KeyboardInterrupt()], ids=["TERM", "HUP", "INT"]
)
def test_an_interruption_that_another_error_hides(
    end: BaseException, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "_prepare_process", lambda: None)

    def cut_short() -> None:
        try:
            try:
                raise end
            finally:
                raise AssertionError("the context was never entered")
        except AssertionError:
            raise RuntimeError("nor left")  # noqa: B904

    with pytest.raises(SystemExit) as ended:
        process.run(cut_short)
    assert ended.value.code == (end.code if isinstance(end, SystemExit) else 130)
    told = capsys.readouterr().err
    assert told == "\nInterrupted. A bundle that was not finished is gone.\n"
