"""The command `bench`: what it asks for, what it shows, and a real run that is as small as can be."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from support.command_line import Invoke, RunCli, assert_refused, outcome_of, without
from support.engine_bundle import write_engine_bundle

from gemma_export.errors import GemmaExportError
from gemma_export.exporter.bench import rounds
from gemma_export.exporter.bench.limits import bytes_per_token
from gemma_export.exporter.bench.rounds import GENAI, OURS
from gemma_export.exporter.bench.values import Machine
from gemma_export.runtime.bundle import open_bundle

SMALL = ["--repeats", "1", "--tokens", "3", "--prompts", "16", "--depths", "0,full,9999", "--threads", "1"]


@pytest.fixture
def known_machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """A machine that need not be measured."""
    machine = Machine(read=1e9, read_by="hand", floats=1e9, integers=1e9)
    monkeypatch.setattr(rounds, "measure_machine", lambda threads: machine)
    return machine


def test_a_run_for_programs(tiny_bundle: Path, known_machine: Machine, invoke: Invoke) -> None:
    outcome = invoke(["bench", tiny_bundle, *SMALL, "--json"])
    assert outcome.code == 0, outcome.err
    *told, result = outcome.events
    assert [event["stage"] for event in told if event["event"] == "finished"] == ["round 1"]
    full = 512 - 3
    assert (result["plan"]["prompts"], result["plan"]["depths"]) == ([16], [0, full])
    assert result["left_out"] == ["3 tokens at depth 9999: the cache has 512 slots"]
    figures = {(figure["name"], figure["at"]): figure for figure in result["figures"]}
    first = next(at for name, at in figures if name == "first token")
    speeds = [("prefill", 16), ("decode", 0), ("decode", full)]
    assert set(figures) == {("load", None), ("first token", first), *speeds, ("peak memory", None)}
    assert all(figure["median"] > 0 and len(figure["values"]) == 1 for figure in figures.values())
    # Each figure and its share of the limit say the same of the memory as what was read beside it.
    manifest = open_bundle(tiny_bundle).manifest
    for depth, beside in zip((0, full), result["reading"]["values"], strict=True):
        figure = figures["decode", depth]
        read = figure["median"] / figure["of_limit"]["median"] * bytes_per_token(manifest, depth + 2)
        assert read == pytest.approx(beside, rel=1e-9)
    assert result["machine"]["read"]["values"] == [known_machine.read]
    size = sum(entry.size for entry in manifest.files.values())
    memory = figures["peak memory", None]
    assert memory["of_limit"]["median"] == pytest.approx(memory["median"] / size)
    assert memory["median"] > size  # The weights are all in it.
    step = result["step"]
    assert step["depth"] == full - 1
    assert 0 < step["weights"] < 1
    assert 0 < result["choosing"] < 1


def test_a_run_for_people(tiny_bundle: Path, known_machine: Machine, tmp_path: Path, invoke: Invoke) -> None:
    plot = tmp_path / "plot.png"
    outcome = invoke(["bench", tiny_bundle, *SMALL, "--plot", plot])
    assert outcome.code == 0, outcome.err
    lines = [" ".join(line.split()) for line in outcome.out.splitlines()]
    assert any(line.startswith("decode at depth 509, tok/s ") and line.endswith("%") for line in lines)
    assert "left out: 3 tokens at depth 9999: the cache has 512 slots" in lines
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("end", "code"), [(KeyboardInterrupt(), 130), (GemmaExportError("It broke.", "Mend it."), 1)]
)
def test_finished_rounds_are_told_whatever_ends_the_next(
    end: BaseException,
    code: int,
    tiny_bundle: Path,
    known_machine: Machine,
    invoke: Invoke,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    machines = iter([known_machine])

    def measure_machine(threads: int) -> Machine:
        for machine in machines:
            return machine
        raise end

    monkeypatch.setattr(rounds, "measure_machine", measure_machine)
    outcome = invoke(["bench", tiny_bundle, *SMALL, "--repeats", "3", "--json"])
    assert outcome.code == code
    result = outcome.events[-1]
    assert len(result["machine"]["read"]["values"]) == 1
    assert result["step"] is None
    assert "Traceback" not in outcome.err
    refused = invoke(["bench", tiny_bundle, *SMALL, "--json"])
    assert refused.code == code
    assert all(event["event"] != "result" for event in refused.events)


def test_in_turns_with_onnxruntime_genai(
    tiny_bundle: Path, known_machine: Machine, invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxruntime_genai")
    turns: list[str] = []
    real = rounds.Worker.run_turn

    def run_turn(worker: rounds.Worker, plan: rounds.Plan) -> object:
        turns.append(worker.job)
        return real(worker, plan)

    monkeypatch.setattr(rounds.Worker, "run_turn", run_turn)
    outcome = invoke(["bench", tiny_bundle, *SMALL, "--repeats", "2", "--compare", "genai", "--json"])
    assert outcome.code == 0, outcome.err
    assert turns == [OURS, "genai", OURS, "genai"]
    for figure in outcome.events[-1]["figures"]:
        peer = figure["peers"][GENAI]
        assert all(value > 0 for value in peer["values"])
        better = 1 if figure["unit"] == "tok/s" else -1
        wanted = [(a / b) ** better for a, b in zip(figure["values"], peer["values"], strict=True)]
        assert peer["ratio"]["values"] == pytest.approx(wanted)


def test_in_turns_with_llama_bench(
    tiny_bundle: Path, known_machine: Machine, tmp_path: Path, invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    program, model = tmp_path / "llama-bench", tmp_path / "model.gguf"
    model.write_bytes(b"GGUF")
    # One second for a prompt of 16 or for 3 tokens, whatever is asked.
    program.write_text(
        f"""#!{sys.executable}
import json, sys
depths = [0, 509] if "-d" in sys.argv else []
prompt = {{"n_prompt": 16, "n_gen": 0, "n_depth": 0, "samples_ns": [10**9]}}
print(json.dumps([{{**prompt, "n_gen": 3, "n_depth": depth}} for depth in depths] or [prompt]))
"""
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    outcome = invoke(["bench", tiny_bundle, *SMALL, "--compare", model, "--json", "-q"])
    assert outcome.code == 0, outcome.err
    peers = {(figure["name"], figure["at"]): figure["peers"] for figure in outcome.events[-1]["figures"]}
    speeds = {at: told[str(model)]["median"] for at, told in peers.items() if told and at[1] is not None}
    assert speeds == {("prefill", 16): 16.0, ("decode", 0): 3.0, ("decode", 509): 3.0}
    assert peers["load", None] == {}


def test_in_turns_with_transformers(
    tiny_bundle: Path, tiny_checkpoint: Path, known_machine: Machine, invoke: Invoke
) -> None:
    outcome = invoke(["bench", tiny_bundle, *SMALL, "--compare", tiny_checkpoint, "--json", "-q"])
    assert outcome.code == 0, outcome.err
    for figure in outcome.events[-1]["figures"]:
        peer = figure["peers"][f"transformers bf16 on {tiny_checkpoint}"]
        assert all(value > 0 for value in peer["values"])


@pytest.mark.slow
def test_the_real_machine(tiny_bundle: Path, run_cli: RunCli) -> None:
    ended = outcome_of(run_cli(["bench", tiny_bundle, *SMALL, "--json", "-q"]))
    assert (ended.code, ended.err) == (0, "")
    (result,) = ended.events
    for rate in ("read", "floats", "integers"):
        assert result["machine"][rate]["median"] > 1e6  # What no machine is below; a unit would be.


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--repeats", "0"], 2, ["measured 0 times"]),
        (["--tokens", "0"], 2, ["0 tokens"]),
        (["--threads", "0"], 2, ["0 threads"]),
        (["--prompts", "16,many"], 2, ["--prompts", "'many'"]),
        (["--depths", "-1,x"], 2, ["--depths", "'x'"]),
        (["--prompts", "0"], 2, ["no token"]),
        (["--prompts", "", "--depths", ""], 2, ["context of 512"]),
        (["--prompts", "9999", "--depths", "9999"], 2, ["context of 512"]),
        (["--compare", "none.gguf"], 2, ["none.gguf is not there"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_measured_is_refused_first(
    options: Sequence[str], code: int, words: list[str], tiny_bundle: Path, invoke: Invoke
) -> None:
    assert_refused(invoke(["bench", tiny_bundle, *options]), code, *words)


def test_no_bundle(tmp_path: Path, invoke: Invoke) -> None:
    assert_refused(invoke(["bench", tmp_path / "none"]), 1, "is not there")


def test_what_is_not_installed_is_missed_first(
    tiny_bundle: Path, tmp_path: Path, run_cli: RunCli, monkeypatch: pytest.MonkeyPatch, invoke: Invoke
) -> None:
    ended = run_cli(["bench", tiny_bundle, "--plot", tmp_path / "p.png"], prelude=without("matplotlib"))
    assert_refused(outcome_of(ended), 1, "matplotlib is not installed")
    assert "gemma-export[parity]" in ended.stderr
    monkeypatch.setattr(rounds, "find_spec", lambda name: None)
    outcome = invoke(["bench", tiny_bundle, "--compare", "genai"])
    assert_refused(outcome, 1, "onnxruntime-genai is not installed")
    outcome = invoke(["bench", tiny_bundle, "--compare", tmp_path])
    assert_refused(outcome, 1, "transformers is not installed")
    assert "gemma-export[parity]" in outcome.err


def test_a_folder_that_is_no_checkpoint(
    tiny_bundle: Path, known_machine: Machine, tmp_path: Path, invoke: Invoke
) -> None:
    outcome = invoke(["bench", tiny_bundle, *SMALL, "-q", "--compare", tmp_path])
    assert_refused(outcome, 1, f"cannot run {tmp_path}")
    assert "--compare CHECKPOINT" in outcome.err


def test_an_engine_needs_its_device(tmp_path: Path, invoke: Invoke) -> None:
    bundle = write_engine_bundle(tmp_path / "engine")
    outcome = invoke(["bench", bundle, "-q", "--prompts", "8", "--depths", "0", "--tokens", "2"])
    # Without a GPU that is the sentence; with one, that this is not a real engine.
    assert_refused(outcome, 1)


def test_an_error_of_the_run_is_that_of_the_command(
    tiny_bundle: Path, known_machine: Machine, invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    outcome = invoke(["bench", tiny_bundle, *SMALL, "-q"])
    assert_refused(outcome, 1, "The process that measures the bundle ended with the code 1")
