"""The command line: its help, what it imports, and what it shows to people and to programs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support.command_line import HEAVY, Invoke, Outcome, RunCli, assert_refused, outcome_of, without
from support.folders import names

from gemma_export.version import __version__

COMMANDS = [
    *("build", "calibrate", "sensitivity", "generate", "chat", "bench", "parity", "inspect", "verify"),
    *("pack", "unpack", "compile"),
]


@pytest.mark.parametrize("arguments", [[], *([command] for command in COMMANDS)], ids=["", *COMMANDS])
@pytest.mark.parametrize("option", ["-h", "--help"])
def test_help(arguments: list[str], option: str, invoke: Invoke) -> None:
    outcome = invoke([*arguments, option])
    assert outcome.code == 0
    assert "Usage:" in outcome.out


def test_version(invoke: Invoke) -> None:
    assert invoke(["--version"]) == Outcome(0, f"gemma-export {__version__}\n", "")


def test_module_is_the_command() -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "gemma_export", "--version"], capture_output=True, text=True, check=True
    )
    assert ended.stdout == f"gemma-export {__version__}\n"


@pytest.mark.parametrize(
    "arguments",
    [["dance"], ["build", "--loud"], ["generate"], ["build", "--seed", "x"], ["build", "--logits", "some"]],
    ids=" ".join,
)
def test_what_there_is_not(arguments: list[str], invoke: Invoke) -> None:
    outcome = invoke(arguments)
    assert outcome.code == 2
    assert not outcome.out
    assert "Traceback" not in outcome.err


@pytest.mark.parametrize(
    "arguments",
    [["build", "--help"], ["compile", "--help"], ["inspect", "BUNDLE"]],
    ids=" ".join,
)
def test_light_commands_need_no_extra(arguments: list[str], tiny_bundle: Path, run_cli: RunCli) -> None:
    arguments = [str(tiny_bundle) if argument == "BUNDLE" else argument for argument in arguments]
    ended = run_cli(arguments, prelude=without(*HEAVY))
    assert (ended.returncode, ended.stderr) == (0, "")


@pytest.mark.parametrize("name", ["build", "calibrate", "sensitivity"])
def test_wrong_request_is_refused_before_anything_heavy_is_imported(name: str, run_cli: RunCli) -> None:
    ended = run_cli([name, "--size", "3b"], prelude=without(*HEAVY))
    assert_refused(outcome_of(ended), 2, "no size '3b'")


@pytest.mark.parametrize(
    ("package", "arguments", "extra"),
    [
        ("torch", ["build", "--size", "tiny"], "gemma-export[export]"),
        ("onnx_ir", ["build", "--size", "tiny"], "gemma-export[export]"),
        ("onnxruntime", ["generate", "BUNDLE", "Once"], "gemma-export[cpu]"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_missing_extra(
    package: str, arguments: list[str], extra: str, tiny_bundle: Path, tmp_path: Path, run_cli: RunCli
) -> None:
    arguments = [str(tiny_bundle) if argument == "BUNDLE" else argument for argument in arguments]
    outcome = outcome_of(run_cli(arguments, prelude=without(package), cwd=tmp_path))
    assert_refused(outcome, 1, package, "not installed")
    assert "pip install" in outcome.err
    assert extra in outcome.err
    assert names(tmp_path) == []


@pytest.mark.usefixtures("traced_once")
def test_json_of_a_build(tmp_path: Path, invoke: Invoke) -> None:
    outcome = invoke(["build", "--size", "tiny", "--parity", "none", "--json", "-o", tmp_path / "b"])
    assert (outcome.code, outcome.err) == (0, "")
    kinds = [event["event"] for event in outcome.events]
    assert kinds[0] == "started"
    assert {"progress", "finished"} < set(kinds)
    assert kinds.count("result") == 1
    result = outcome.events[-1]
    assert result["bundle"] == str(tmp_path / "b")
    assert result["manifest"] == json.loads((tmp_path / "b" / "manifest.json").read_text())


@pytest.mark.usefixtures("traced_once")
def test_quiet_build(tmp_path: Path, invoke: Invoke) -> None:
    build = ["build", "--size", "tiny", "--parity", "none", "--quiet"]
    assert invoke([*build, "-o", tmp_path / "a"]) == Outcome(0, "", "")
    outcome = invoke([*build, "-o", tmp_path / "b", "--json"])
    assert [event["event"] for event in outcome.events] == ["result"]


@pytest.mark.usefixtures("traced_once")
def test_summary_of_a_build(tmp_path: Path, invoke: Invoke) -> None:
    output = tmp_path / "a b"
    outcome = invoke(["build", "--size", "tiny", "--parity", "none", "-o", output])
    assert outcome.code == 0
    assert [line.split()[:2] for line in outcome.err.splitlines()] == [
        ["✓", stage] for stage in ("checkpoint", "tokenizer", "trace", "passes", "weights")
    ]
    assert "not measured" in outcome.out
    assert f"gemma-export generate '{output}' 'Once upon a time'" in outcome.out  # may be pasted into a shell


def test_json_of_a_bundle(tiny_bundle: Path, invoke: Invoke) -> None:
    outcomes = [
        invoke(["verify", tiny_bundle, "--json"]),
        invoke(["inspect", tiny_bundle, "--json"]),
        invoke(["generate", tiny_bundle, "Once", "--max-new-tokens", "4", "--json"]),
    ]
    assert [(outcome.code, outcome.err, len(outcome.events)) for outcome in outcomes] == [(0, "", 1)] * 3
    verified, manifest, generation = (outcome.events[0] for outcome in outcomes)
    assert verified["verified"] is True
    assert manifest == json.loads((tiny_bundle / "manifest.json").read_text())
    assert len(generation["tokens"]) == 4
    assert generation["finish_reason"] == "length"


def test_json_of_a_failure_is_empty(tmp_path: Path, invoke: Invoke) -> None:
    assert_refused(invoke(["verify", tmp_path, "--json"]), 1, "is not a bundle")


def test_parity_report(tiny_bundle: Path, tmp_path: Path, invoke: Invoke) -> None:
    outcome = invoke(["parity", tiny_bundle, "--level", "quick", "-o", tmp_path / "report"])
    assert outcome.code == 0, outcome.err
    assert "pass (quick)" in outcome.out
    assert names(tmp_path / "report") == ["parity.html", "parity.json"]


@pytest.mark.slow
def test_whole_build_in_a_process_of_its_own(tmp_path: Path, run_cli: RunCli) -> None:
    ended = run_cli(["build", "--size", "tiny", "--quiet"], cwd=tmp_path)
    assert outcome_of(ended) == Outcome(0, "", "")
    ended = run_cli(["generate", "bundles/gemma-tiny-fp32-cpu", "Once upon a time"], cwd=tmp_path)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert len(ended.stdout) > 20
