"""The command line as a process: streams, signals, exit codes, and what it imports."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from support.command_line import Outcome, assert_refused, command
from support.damage import flip_byte

from gemma_export.exporter.engines.options import EngineOptions
from gemma_export.exporter.request import BuildRequest, CalibrationRequest
from gemma_export.version import __version__

Invoke = Callable[[Sequence[object]], Outcome]
RunCli = Callable[..., "subprocess.CompletedProcess[str]"]

COMMANDS = [
    *("build", "calibrate", "sensitivity", "generate", "chat", "parity", "inspect", "verify"),
    *("pack", "unpack", "compile"),
]
HEAVY = ("torch", "onnx", "onnxscript", "onnxruntime", "transformers", "matplotlib")


def without(*packages: str) -> str:
    """Lines of Python after which packages are not there."""
    return f"import sys; sys.modules |= dict.fromkeys({packages!r})"


def outcome_of(ended: "subprocess.CompletedProcess[str]") -> Outcome:
    return Outcome(ended.returncode, ended.stdout, ended.stderr)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# Help and imports


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


def test_defect_is_said_without_a_traceback(run_cli: RunCli, tiny_bundle: Path) -> None:
    prelude = "from gemma_export.runtime import bundle; bundle.open_bundle = None"
    ended = run_cli(["verify", tiny_bundle], prelude=prelude)
    assert ended.returncode == 1
    assert ended.stderr.startswith("defect: TypeError")
    assert "Traceback" not in ended.stderr
    ended = run_cli(["verify", tiny_bundle], prelude=prelude, env={**os.environ, "GEMMA_EXPORT_DEBUG": "1"})
    assert "Traceback" in ended.stderr


# Output


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


# Quantization

QUANTIZED = [
    *("--size", "2b", "--random-weights", "--seed", "3", "--tokenizer", "t.model", "--precision", "int8"),
    *("--target", "onnx", "--scheme", "w8a8"),
]
CALIBRATED = [
    *("--calibration-data", "text.txt", "--calibration-samples", "9", "--calibration-length", "99"),
    *("--calibration-seed", "7", "--observer", "entropy"),
]
REQUEST = BuildRequest(
    size="2b",
    random_weights=True,
    seed=3,
    tokenizer=Path("t.model"),
    precision="int8",
    target="onnx",
    scheme_name="w8a8",
    calibration=CalibrationRequest(Path("text.txt"), 9, 99, 7, "entropy"),
)


class Report:
    """As little of a report as the command line needs."""

    def to_json(self) -> dict[str, Any]:
        return {"tokens": 12, "units": []}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the commands ask of the modules that do the work, which are not there."""
    calls: list[Any] = []
    functions = {
        "calibrate": {"run": lambda request, output, listener: calls.append((request, output))},
        "sensitivity": {
            "measure_sensitivity": lambda request, text, listener: calls.append((request, text)) or Report()
        },
        "sensitivity_table": {"sensitivity_table": lambda report: f"a table of {report.to_json()['tokens']}"},
    }
    for name, contents in functions.items():
        module = ModuleType(f"gemma_export.exporter.quantize.{name}")
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return calls


def test_options_of_a_build_become_a_request(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    from gemma_export.exporter import pipeline

    requests: list[BuildRequest] = []

    def build(request: BuildRequest, listener: object) -> None:
        requests.append(request)
        sys.exit(9)

    monkeypatch.setattr(pipeline, "build", build)
    assert invoke(["build", *QUANTIZED, *CALIBRATED]).code == 9
    cpu = ["build", "--size", "tiny", "--precision", "int8", "--kv-cache", "int8", "--scales", "s.json"]
    assert invoke([*cpu, "--max-kl", "0.25", "--max-perplexity-increase", "1.5"]).code == 9
    int4 = ["build", "--size", "tiny", "--precision", "int4", "--block", "64", "--no-calibration"]
    assert invoke(int4).code == 9
    rtx = ["build", "--size", "2b", "--precision", "int8", "--target", "rtx", "--sm", "86,8.9", "--sm", "75"]
    assert invoke([*rtx, "--max-batch", "4", "--prefill-chunk", "64", "--memory", "7.5GB"]).code == 9
    device = ["build", "--size", "2b", "--precision", "int8", "--target", "tensorrt"]
    assert invoke([*device, "--device", "orin-nano-8gb"]).code == 9
    assert requests == [
        REQUEST,
        BuildRequest(
            size="tiny",
            precision="int8",
            kv_cache="int8",
            scales=Path("s.json"),
            max_kl=0.25,
            max_perplexity_increase=1.5,
        ),
        BuildRequest(size="tiny", precision="int4", block=64, no_calibration=True),
        BuildRequest(
            size="2b",
            precision="int8",
            target="rtx",
            engines=EngineOptions((75, 86, 89), 4, 64, memory=7_500_000_000),
        ),
        BuildRequest(
            size="2b", precision="int8", target="tensorrt", engines=EngineOptions(device="orin-nano-8gb")
        ),
    ]


def test_calibration_into_a_file(asked: list[Any], tmp_path: Path, invoke: Invoke) -> None:
    output = tmp_path / "my scales.json"
    outcome = invoke(["calibrate", *QUANTIZED, *CALIBRATED, "-o", output])
    assert outcome.code == 0, outcome.err
    assert asked == [(REQUEST, output)]
    assert (  # may be pasted into a shell
        "gemma-export build --size 2b --tokenizer t.model --random-weights --seed 3 --precision int8 "
        f"--target onnx --scheme w8a8 --scales '{output}'" in outcome.out
    )
    cache = ["calibrate", "--checkpoint", "a b", "--precision", "int4", "--kv-cache", "int8"]
    outcome = invoke(cache)
    assert asked[1][1] == Path("scales.json")
    assert (
        "gemma-export build --checkpoint 'a b' --precision int4 --target cpu --kv-cache int8 "
        "--scales scales.json" in outcome.out
    )


def test_calibration_for_programs(asked: list[Any], tmp_path: Path, invoke: Invoke) -> None:
    arguments = ["calibrate", "--size", "tiny", "-o", tmp_path / "s.json"]
    assert invoke([*arguments, "-q"]) == Outcome(0, "", "")
    outcome = invoke([*arguments, "-q", "--json"])
    assert outcome.events == [{"event": "result", "scales": str(tmp_path / "s.json")}]
    assert [request.precision for request, _ in asked] == ["int8", "int8"]


def test_scales_are_not_written_over_what_is_there(asked: list[Any], tmp_path: Path, invoke: Invoke) -> None:
    output = tmp_path / "scales.json"
    output.write_text("{}")
    refused = invoke(["calibrate", "--size", "tiny", "-o", output])
    assert_refused(refused, 2, f"{output} exists")
    assert "--force" in refused.err
    assert_refused(invoke(["calibrate", "--size", "tiny", "-o", tmp_path, "--force"]), 2, "is a folder")
    assert asked == []
    assert invoke(["calibrate", "--size", "tiny", "-o", output, "--force"]).code == 0
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("name", "words"),
    [("calibrate", "fp16 has nothing to calibrate"), ("sensitivity", "fp16 quantizes nothing")],
)
def test_a_precision_without_scales(name: str, words: str, asked: list[Any], invoke: Invoke) -> None:
    outcome = invoke([name, "--size", "tiny", "--precision", "fp16"])
    assert_refused(outcome, 2, words)
    assert "int8 or --precision int4" in outcome.err
    assert asked == []


def test_sensitivity(asked: list[Any], tmp_path: Path, invoke: Invoke) -> None:
    output = tmp_path / "new" / "report.json"
    outcome = invoke(["sensitivity", *QUANTIZED, *CALIBRATED, "--text", "other.txt", "-o", output])
    assert outcome.code == 0, outcome.err
    assert asked == [(REQUEST, Path("other.txt"))]
    assert "a table of 12" in outcome.out
    assert json.loads(output.read_text()) == {"tokens": 12, "units": []}
    outcome = invoke(["sensitivity", "--size", "tiny", "--scales", "s.json", "--json"])
    assert outcome.events == [{"event": "result", "tokens": 12, "units": []}]
    assert asked[1] == (BuildRequest(size="tiny", precision="int8", scales=Path("s.json")), None)
    assert_refused(invoke(["sensitivity", "--size", "tiny", "-o", tmp_path]), 2, "is a folder")
    assert len(asked) == 2


def test_missing_file_of_scales_is_a_wrong_request(tmp_path: Path, invoke: Invoke) -> None:
    arguments = ["build", "--size", "tiny", "--precision", "int8", "-q", "-o", tmp_path / "b"]
    outcome = invoke([*arguments, "--scales", tmp_path / "scales.json"])
    assert_refused(outcome, 2, f"There is no file {tmp_path / 'scales.json'}")
    assert names(tmp_path) == []


# Shipping


def test_bundle_goes_through_an_archive(
    tiny_bundle: Path, tmp_path: Path, invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = invoke(["pack", tiny_bundle, "my bundle.tar"])
    assert outcome.code == 0
    assert "gemma-export unpack 'my bundle.tar'" in outcome.out  # may be pasted into a shell
    outcome = invoke(["unpack", "my bundle.tar"])
    assert outcome.code == 0
    assert "gemma-export inspect 'my bundle'" in outcome.out
    assert invoke(["verify", "my bundle"]).code == 0
    assert names(tmp_path / "my bundle") == names(tiny_bundle)
    assert names(tmp_path) == ["my bundle", "my bundle.tar"]


def test_shipping_for_programs(tiny_bundle: Path, tmp_path: Path, invoke: Invoke) -> None:
    archive, folder = tmp_path / "b.tar", tmp_path / "b"
    outcome = invoke(["pack", tiny_bundle, archive, "-q", "--json"])
    size = archive.stat().st_size
    assert outcome.events == [{"event": "result", "archive": str(archive), "bytes": size}]
    outcome = invoke(["unpack", archive, "-o", folder, "--json"])
    assert [event["event"] for event in outcome.events][-1] == "result"
    assert outcome.events[-1]["bundle"] == str(folder)
    assert invoke(["pack", tiny_bundle, archive, "--force", "-q"]) == Outcome(0, "", "")
    assert invoke(["unpack", archive, "-o", folder, "--force", "-q"]) == Outcome(0, "", "")


def test_nothing_is_replaced_by_shipping_without_force(
    tiny_bundle: Path, tmp_path: Path, invoke: Invoke
) -> None:
    archive, folder = tmp_path / "b.tar", tmp_path / "b"
    assert invoke(["pack", tiny_bundle, archive, "-q"]).code == 0
    refused = invoke(["pack", tiny_bundle, archive, "-q"])
    assert_refused(refused, 2, f"{archive} exists")
    assert "--force" in refused.err
    assert_refused(invoke(["pack", tiny_bundle, tmp_path, "--force"]), 2, "is a folder")
    assert invoke(["unpack", archive, "-o", folder, "-q"]).code == 0
    assert_refused(invoke(["unpack", archive, "-o", folder, "-q"]), 2, "already holds a bundle")
    assert_refused(invoke(["pack", tiny_bundle, tmp_path / "e.tar", "--engines-only"]), 2, "no engines")


def test_shipping_needs_no_extra(tiny_bundle: Path, tmp_path: Path, run_cli: RunCli) -> None:
    archive, folder = tmp_path / "b.tar", tmp_path / "b"
    for arguments in (["pack", tiny_bundle, archive], ["unpack", archive, "-o", folder], ["verify", folder]):
        ended = run_cli(arguments, prelude=without(*HEAVY))
        assert ended.returncode == 0, ended.stderr


def test_damaged_archive_leaves_no_bundle(tiny_bundle: Path, tmp_path: Path, invoke: Invoke) -> None:
    archive = tmp_path / "b.tar"
    assert invoke(["pack", tiny_bundle, archive, "-q"]).code == 0
    flip_byte(archive, archive.stat().st_size // 2)
    outcome = invoke(["unpack", archive, "-o", tmp_path / "b", "-q"])
    assert_refused(outcome, 1, "is not what the manifest says")
    assert names(tmp_path) == ["b.tar"]
    assert_refused(invoke(["unpack", tmp_path / "nowhere.tar", "-q"]), 2, "There is no file")


def test_what_can_not_be_compiled(tiny_bundle: Path, tmp_path: Path, invoke: Invoke) -> None:
    before = {name: (tiny_bundle / name).read_bytes() for name in names(tiny_bundle)}
    outcome = invoke(["compile", tiny_bundle, "--target", "rtx", "-q"])
    assert_refused(outcome, 2, "was built for cpu, whose operators TensorRT does not have")
    assert "--target onnx" in outcome.err
    assert invoke(["compile", tiny_bundle, "--target", "cpu"]).code == 2
    assert_refused(invoke(["compile", tmp_path / "nowhere", "--target", "rtx", "-q"]), 1, "is not there")
    assert {name: (tiny_bundle / name).read_bytes() for name in names(tiny_bundle)} == before


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


# Input


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


# Signals

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


@pytest.mark.slow
def test_whole_build_in_a_process_of_its_own(tmp_path: Path, run_cli: RunCli) -> None:
    ended = run_cli(["build", "--size", "tiny", "--quiet"], cwd=tmp_path)
    assert outcome_of(ended) == Outcome(0, "", "")
    ended = run_cli(["generate", "bundles/gemma-tiny-fp32-cpu", "Once upon a time"], cwd=tmp_path)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert len(ended.stdout) > 20


def test_two_builds_into_one_folder(tmp_path: Path, invoke: Invoke) -> None:
    from gemma_export.exporter.bundle import new_bundle

    output = tmp_path / "b"
    with new_bundle(output, force=False) as folder:
        assert_refused(invoke(["build", "--size", "tiny", "-q", "-o", output]), 2, "Another build is writing")
        (folder / "manifest.json").write_text("{}")
    assert names(tmp_path) == ["b"]
