"""From rounds to figures, tables and a picture: numbers that were chosen so that the results are known."""

import json
from dataclasses import replace
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.image import imread
from rich.console import Console
from support.small_bundle import Shape, manifest

from gemma_export.exporter.bench.plot import write_plot
from gemma_export.exporter.bench.report import Figure, Host, Report, Spread
from gemma_export.exporter.bench.rounds import OURS, Round
from gemma_export.exporter.bench.table import bench_table
from gemma_export.exporter.bench.values import Machine, Plan, StepParts, Timing, Turn
from gemma_export.runtime.manifest import ByteCounts, FileEntry, Manifest, ParameterCounts

PLAN = Plan(prompts=(100,), depths=(0, 20), tokens=10, chunk=50, threads=2)
MACHINE = Machine(read=1e9, read_by="dot product", floats=2e9, integers=4e9)
STEP = StepParts(20, 0.006, 0.001, 0.001, 0.0005, 0.0005, 0.001, 0.002)
PEER = "peer[1]"  # Markup is no part of a name.


def read_manifest() -> Manifest:
    """No cache and no attention: a token is 1e6 bytes, a token of a prompt 2e6 operations."""
    files = {"model.onnx": {"size": 2_000_000, "sha256": ""}}
    read = Manifest.from_json(json.dumps({**manifest(Shape(logits="last")), "files": files}))
    model = replace(
        read.model,
        num_query_heads=0,
        vocab_size=1,
        hidden_size=0,
        parameters=ParameterCounts(0, 1_000_000),
    )
    return replace(
        read, model=model, bytes=ByteCounts(0, 1_000_000, 0), files={"model.onnx": FileEntry(2_000_000, "")}
    )


def turn(speed: float, load: float | None = 1.0, peak: int = 3_000_000) -> Turn:
    """Decoding at `speed` and at half of it, prompts at ten times that."""
    return Turn(
        load=load,
        first_token=None if load is None else Timing(0, 40, 40 / speed),
        prefill=(Timing(100, 100, 10 / speed),),
        decode=(Timing(0, 10, 10 / speed), Timing(20, 10, 20 / speed)),
        choosing=None if load is None else 3 / speed,
        peak=peak,
    )


def report(*rounds: Round) -> Report:
    host = Host("A processor", "Linux", {"onnxruntime": "1.31.1"}, "avx2")
    return Report(
        Path("bundle"),
        read_manifest(),
        host,
        PLAN,
        ("a prompt of 512",),
        rounds,
        STEP if rounds[0].machine else None,
    )


def alone(*speeds: float) -> Report:
    return report(*(Round(0.5, MACHINE, {OURS: turn(speed)}, 0.1) for speed in speeds))


def figure(report: Report, name: str, at: int | None = None) -> Figure:
    (found,) = [figure for figure in report.figures() if (figure.name, figure.at) == (name, at)]
    return found


def test_medians_and_spreads() -> None:
    measured = alone(100.0, 400.0, 200.0)
    assert figure(measured, "decode", 0).ours == Spread((100.0, 400.0, 200.0))
    spread = figure(measured, "decode", 20).ours
    assert (spread.median, spread.low, spread.high) == (100.0, 50.0, 200.0)
    assert figure(measured, "prefill", 100).ours.median == pytest.approx(2000.0)
    assert figure(measured, "load").ours.median == 1.0
    assert figure(measured, "first token", 40).ours.median == 0.2
    assert measured.choosing == pytest.approx(0.1)  # 3 of 30 seconds at any speed


def test_a_figure_is_a_share_of_what_the_machine_allows() -> None:
    measured = alone(100.0, 400.0, 200.0)
    # 1e9 bytes a second are 1,000 tokens of 1e6; 2e9 operations as many tokens of a prompt.
    decode, prefill = figure(measured, "decode", 0).limit, figure(measured, "prefill", 100).limit
    assert decode is not None
    assert decode.values == pytest.approx((0.1, 0.4, 0.2))
    assert prefill is not None
    assert prefill.values == pytest.approx((1.0, 4.0, 2.0))
    memory = figure(measured, "peak memory")
    assert memory.limit is not None
    assert (memory.ours.median, memory.limit.median) == (3e6, 1.5)
    assert figure(measured, "load").limit is None


def test_shares_and_ratios_are_taken_round_by_round() -> None:
    slower = replace(MACHINE, read=0.5e9)
    measured = report(
        Round(0.5, MACHINE, {OURS: turn(400.0), PEER: turn(200.0, 2.0, 6_000_000)}, 0.1),
        Round(2.5, slower, {OURS: turn(200.0), PEER: turn(50.0, 3.0, 1_500_000)}, 1.5),
    )
    decode = figure(measured, "decode", 0)
    assert decode.limit is not None
    assert decode.limit.values == pytest.approx((0.4, 0.4))
    assert decode.peers[PEER] == Spread((200.0, 50.0))
    assert decode.ratios[PEER].values == pytest.approx((2.0, 4.0))
    # Where less is better, a ratio above 1 is ours all the same.
    assert figure(measured, "load").ratios[PEER].values == (2.0, 3.0)
    assert figure(measured, "peak memory").ratios[PEER].values == (2.0, 0.5)


def test_a_peer_that_does_not_tell_has_no_figure() -> None:
    measured = report(Round(0.5, MACHINE, {OURS: turn(400.0), PEER: turn(200.0, load=None)}, 0.1))
    for name, at in (("load", None), ("first token", 40)):
        assert figure(measured, name, at).peers == {}
    assert figure(measured, "decode", 20).ratios[PEER].median == pytest.approx(2.0)


def test_what_is_not_known_of_the_machine_is_no_limit() -> None:
    without_onnx = replace(MACHINE, floats=None, integers=None)
    measured = report(Round(0.5, without_onnx, {OURS: turn(400.0)}, 0.1))
    assert figure(measured, "prefill", 100).limit is None
    assert figure(measured, "decode", 0).limit is not None
    device = report(Round(0.5, None, {OURS: turn(400.0)}, 0.1))
    assert figure(device, "decode", 0).limit is None
    assert (device.machine("read"), device.step) == (None, None)
    for told in (measured, device):
        assert "of the limit" in table(told)
        json.dumps(told.to_json(), allow_nan=False)


@given(st.lists(st.floats(1e-6, 1e9), min_size=1, max_size=7))
def test_a_spread_has_its_median_within(values: list[float]) -> None:
    spread = Spread(tuple(values))
    assert spread.low <= spread.median <= spread.high
    assert sum(value <= spread.median for value in values) >= len(values) / 2


def table(report: Report, width: int = 100) -> str:
    file = StringIO()
    Console(file=file, width=width, soft_wrap=True).print(bench_table(report))
    return file.getvalue()


def test_table() -> None:
    text = table(
        report(
            Round(0.5, MACHINE, {OURS: turn(400.0), PEER: turn(200.0)}, 0.1),
            Round(2.5, MACHINE, {OURS: turn(300.0), PEER: turn(200.0)}, 1.25),
        )
    )
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "decode at depth 0, tok/s 350 (300, 400) 35%" in lines
    assert "peak memory, MB 3.00 (3.00, 3.00) 1.50 times the bundle" in lines
    assert f"beside {PEER} median (from, to) ratio (from, to)" in lines
    assert "decode at depth 20, tok/s 100 (100, 100) 1.75 (1.50, 2.00)" in lines
    assert "A processor, 2 threads, 2 rounds, kernels: avx2" in lines
    assert "others kept 1.2 cores busy at most; the load average was 2.5 at most" in lines
    assert "read per token: 1.00 MB at depth 0, 1.00 MB at depth 20" in lines
    assert "choosing a token and making it text: 10.0% of decoding" in lines
    assert "left out: a prompt of 512" in lines
    (parts,) = [line for line in lines if line.startswith("a token at depth 20 under a profiler")]
    assert "weights 6.00 (60.0%)" in parts
    assert parts.endswith("drawn with top-k and top-p instead of chosen: 2.00")


def test_json_has_what_the_table_has() -> None:
    values = alone(100.0, 400.0, 200.0).to_json()
    decode = next(f for f in values["figures"] if (f["name"], f["at"]) == ("decode", 0))
    assert (decode["median"], decode["low"], decode["high"], decode["values"]) == (
        200,
        100,
        400,
        [100, 400, 200],
    )
    assert decode["of_limit"]["median"] == pytest.approx(0.2)
    assert values["bytes"] == {"bundle": 2_000_000, "per_token": {"0": 1_000_000, "20": 1_000_000}}
    assert (values["machine"]["read"]["median"], values["read_by"]) == (1e9, ["dot product"])
    assert values["plan"]["threads"] == 2
    assert values["left_out"] == ["a prompt of 512"]
    assert json.loads(json.dumps(values, allow_nan=False))["step"]["depth"] == 20


def test_plot_is_a_png_with_a_bar_for_each(tmp_path: Path) -> None:
    measured = report(Round(0.5, MACHINE, {OURS: turn(400.0), PEER: turn(200.0)}, 0.1))
    write_plot(measured, tmp_path / "plot.png")
    data = (tmp_path / "plot.png").read_bytes()
    assert data.startswith(b"\x89PNG")
    pixels = np.round(imread(tmp_path / "plot.png")[..., :3], 1).reshape(-1, 3)
    for colour in ((0.2, 0.4, 0.7), (0.9, 0.5, 0.2)):  # of the bundle, and of its peer
        assert (np.abs(pixels - colour).max(axis=1) < 0.01).sum() > 1000
