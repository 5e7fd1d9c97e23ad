"""What `llama-bench` is asked for, and what is made of its answer: a program that the test writes."""

import os
import sys
from pathlib import Path

import pytest

from gemma_export.errors import GemmaExportError, MissingDependencyError, UsageError
from gemma_export.exporter.bench.llama import LlamaBench
from gemma_export.exporter.bench.values import Plan, Timing

PLAN = Plan(prompts=(128, 512), depths=(0, 480), tokens=32, chunk=256, threads=3)

# Its options, combinations and fields are those of tools/llama-bench/README.md of ggml-org/llama.cpp.
PROGRAM = """
import json, sys
given = sys.argv[1:]
options = dict(zip(given[::2], given[1::2]))
assert set(options) <= {"-m", "-t", "-r", "-o", "-p", "-n", "-d"}, options
assert (options["-t"], options["-r"], options["-o"]) == ("3", "1", "json"), options
numbers = {name: [int(n) for n in options.get(name, "0").split(",")] for name in ("-p", "-n", "-d")}
tests = []
for depth in numbers["-d"]:
    for prompt, new in [(n, 0) for n in numbers["-p"] if n] + [(0, n) for n in numbers["-n"] if n]:
        nanoseconds = 1_000_000 * (prompt + 100 * new + depth)
        tests.append({"model_filename": options["-m"], "n_prompt": prompt, "n_gen": new, "n_depth": depth,
                      "samples_ns": [nanoseconds], "samples_ts": [1e9 * (prompt + new) / nanoseconds]})
print("loading", file=sys.stderr)
print(json.dumps(tests))
"""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model-Q8_0.gguf"
    path.write_bytes(b"GGUF")
    return path


def install(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts a `llama-bench` on the PATH."""
    program = folder / "bin" / "llama-bench"
    program.parent.mkdir()
    program.write_text(f"#!{sys.executable}\n{script}")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)


def test_a_turn(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, PROGRAM, monkeypatch)
    turn, others = LlamaBench.find(model).run_turn(PLAN)
    assert turn.prefill == (Timing(128, 128, 0.128), Timing(512, 512, 0.512))
    assert turn.decode == (Timing(0, 32, 3.2), Timing(480, 32, 3.68))
    assert (turn.load, turn.first_token, turn.choosing) == (None, None, None)
    assert turn.peak > 1 << 20  # A Python has more than that.
    assert others >= 0


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("import sys; sys.exit('error: failed to load model')", ["code 1", "failed to load model"]),
        ("import os; os.kill(os.getpid(), 9)", ["signal 9"]),
        ("print('| model | size |')", ["no JSON"]),
        ("print('{}')", ["no JSON"]),
        ("print('[{\"n_gen\": 0}]')", ["samples_ns"]),
        ('print(\'[{"samples_ns": [1], "n_gen": 32}]\')', ["n_depth"]),  # before there was an option -d
    ],
    ids=["fails", "is killed", "a table", "an object", "other fields", "old"],
)
def test_another_program(
    script: str, words: list[str], tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, script, monkeypatch)
    with pytest.raises(GemmaExportError) as error:
        LlamaBench.find(model).run_turn(PLAN)
    for word in words:
        assert word in error.value.message


def test_what_is_not_there(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UsageError, match=r"none\.gguf is not there"):
        LlamaBench.find(tmp_path / "none.gguf")
    with pytest.raises(MissingDependencyError, match="llama-bench is not installed"):
        LlamaBench.find(model)
