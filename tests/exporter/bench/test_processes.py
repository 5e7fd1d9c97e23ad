"""Processes that measure: their answers, their ends and their memory."""

import os
import sys
from pathlib import Path

import pytest

from gemma_export.errors import BundleError, GemmaExportError
from gemma_export.exporter.bench import processes
from gemma_export.exporter.bench.processes import run_process, run_worker
from gemma_export.exporter.bench.values import Machine, Plan, Turn

PLAN = Plan((4,), (0,), 1, 8, 1)
TOUCHED = 150 << 20


def python(script: str) -> list[str]:
    return [sys.executable, "-c", script]


def test_what_a_process_wrote_and_needed() -> None:
    script = (
        "import sys\nfrom gemma_export.exporter.bench.processes import own_peak\n"
        f"block = b'x' * {TOUCHED}\ndel block\nprint(own_peak())\nprint('note', file=sys.stderr)\nsys.exit(3)"
    )
    ended = run_process(python(script))
    assert (ended.code, ended.err) == (3, "note\n")
    # The same peak from within and from without; only the latter may include what started it.
    assert TOUCHED < int(ended.out) <= ended.peak
    assert ended.others >= 0


def test_the_peak_of_a_process_is_not_that_of_what_started_it() -> None:
    block = b"x" * 2 * TOUCHED
    script = "from gemma_export.exporter.bench.processes import own_peak; print(own_peak())"
    assert int(run_process(python(script)).out) < TOUCHED
    assert len(block) == 2 * TOUCHED


def test_an_interrupted_process_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[int] = []

    def interrupt(process: int, options: int) -> None:
        begun.append(process)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "wait4", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_process(python("import time; time.sleep(60)"))
    with pytest.raises(ProcessLookupError):
        os.kill(begun[0], 0)


def test_an_error_comes_back_as_it_was(tmp_path: Path) -> None:
    with pytest.raises(BundleError) as error:
        run_worker("bundle", {"path": str(tmp_path / "none"), "plan": PLAN, "on_cpu": False}, Turn)
    assert error.value.message == f"{tmp_path / 'none'} is not there."
    assert "gemma-export build" in error.value.hint


def test_a_package_that_is_missing_is_missed_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package = tmp_path / "onnxruntime_genai.py"
    package.write_text("raise ModuleNotFoundError('none here', name='onnxruntime_genai')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(ModuleNotFoundError) as error:
        run_worker("genai", {"path": str(tmp_path), "plan": PLAN}, Turn)
    assert error.value.name == "onnxruntime_genai"


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("import os; os.kill(os.getpid(), 9)", "signal 9"),
        ("raise SystemExit('no such luck')", "code 1: no such luck"),
        ("print('hello')", "code 0"),
        ("print('{}')", "code 0"),
        ("print('[1]')", "code 0"),
        ('print(\'{"result": {"read": 1}}\')', "code 0"),
    ],
    ids=["killed", "ended", "no JSON", "no answer", "a list", "half an answer"],
)
def test_a_process_without_an_answer(script: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = run_process
    monkeypatch.setattr(processes, "run_process", lambda command: real(python(script)))
    with pytest.raises(GemmaExportError) as error:
        run_worker("machine", {"threads": 1}, Machine)
    assert words in error.value.message
    assert error.value.message.startswith("The process that measures the machine ")
