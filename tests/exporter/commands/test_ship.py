"""The commands `pack` and `unpack`, and what `compile` refuses."""

from pathlib import Path

import pytest
from support.command_line import HEAVY, Invoke, Outcome, RunCli, assert_refused, without
from support.damage import flip_byte
from support.folders import names


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
