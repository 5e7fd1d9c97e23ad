"""The options of quantized builds as a request, and the commands `calibrate` and `sensitivity`."""

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from support.command_line import Invoke, Outcome, assert_refused
from support.folders import names

from gemma_export.exporter import pipeline
from gemma_export.exporter.engines.options import EngineOptions
from gemma_export.exporter.request import BuildRequest, CalibrationRequest

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
