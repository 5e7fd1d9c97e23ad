"""Where a bundle cannot be written, a build says so in one sentence and a hint, and what is there stays."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from support.command_line import Invoke, Outcome, assert_refused
from support.disk import largest_file
from support.folders import only

from gemma_export.exporter import bundle, pipeline
from gemma_export.graphs import direct_file


def refuse_room(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")._replace(free=bundle.MARGIN_BYTES)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)


def fill_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    left = 10_000_000

    write = os.write

    def write_some(descriptor: int, data: memoryview) -> int:
        nonlocal left
        left -= len(data)
        if left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, data)

    monkeypatch.setattr(direct_file.os, "write", write_some)


def fill_disk_late(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    monkeypatch.setattr(pipeline, "write_report", full)
    monkeypatch.setattr(pipeline, "_check_parity", lambda *arguments: object())


@pytest.mark.usefixtures("traced_once")
@pytest.mark.parametrize(
    ("fill", "words"),
    [
        pytest.param(refuse_room, "The bundle needs 0.09 GB", id="seen beforehand"),
        pytest.param(fill_disk, "No space left on device", id="at the weights"),
        pytest.param(fill_disk_late, "Disk quota exceeded", id="at the report"),
    ],
)
def test_full_disk(
    fill: Callable[[pytest.MonkeyPatch], None],
    words: str,
    tmp_path: Path,
    invoke: Invoke,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fill(monkeypatch)
    assert_refused(invoke(["build", "--size", "tiny", "-o", tmp_path / "b", "-q"]), 1, words)
    only(tmp_path)


@pytest.mark.usefixtures("traced_once")
@pytest.mark.parametrize("size", [1_000, 100_000], ids=["at the tokenizer", "at the weights"])
def test_system_refuses_to_write_more(size: int, tmp_path: Path, invoke: Invoke) -> None:
    with largest_file(size):
        outcome = invoke(["build", "--size", "tiny", "-o", tmp_path / "b", "-q"])
    assert_refused(outcome, 1, "takes no more: File too large")
    only(tmp_path)


# Even root can make no folder in these.
@pytest.mark.parametrize(
    ("output", "words"),
    [
        pytest.param("/proc/bundle", "cannot be written", id="no folders there"),
        pytest.param("/sys/kernel/bundle", "cannot be written", id="not permitted"),
        pytest.param("/dev/null/bundle", "cannot be written", id="below a file"),
        pytest.param("x" * 300, "cannot be written: File name too long", id="name too long"),
    ],
)
def test_unwritable_output(
    output: str, words: str, tmp_path: Path, invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert_refused(invoke(["build", "--size", "tiny", "-o", output, "-q"]), 1, words)
    only(tmp_path)


def test_read_only_file_system(tmp_path: Path, invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, *arguments: object, **options: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    outcome = invoke(["build", "--size", "tiny", "-o", tmp_path / "b", "-q"])
    assert_refused(outcome, 1, "cannot be written: Read-only file system")
    only(tmp_path)


def other_folder(output: Path) -> None:
    output.mkdir()
    (output / "thesis.txt").write_text("years of work")


def other_manifest(output: Path) -> None:
    output.mkdir()
    (output / "manifest.json").write_text('{"name": "a web extension"}')


OTHERS: dict[str, Callable[[Path], object]] = {
    "folder": other_folder,
    "folder with another manifest": other_manifest,
    "file": lambda output: output.write_text("years of work"),
    "link": lambda output: output.symlink_to("elsewhere"),
}


@pytest.mark.parametrize("make", OTHERS.values(), ids=OTHERS)
@pytest.mark.parametrize("force", [[], ["--force"]], ids=["", "force"])
def test_output_that_is_not_ours(
    make: Callable[[Path], object], force: list[str], tmp_path: Path, invoke: Invoke
) -> None:
    output = tmp_path / "b"
    make(output)
    before = [(path, path.lstat().st_mtime_ns) for path in sorted(tmp_path.rglob("*"))]
    assert_refused(invoke(["build", "--size", "tiny", "-o", output, "-q", *force]), 2, str(output), "exists")
    assert [(path, path.lstat().st_mtime_ns) for path in sorted(tmp_path.rglob("*"))] == before


def test_older_bundle_needs_force(bundle_copy: Path, invoke: Invoke) -> None:
    outcome = invoke(["build", "--size", "tiny", "-o", bundle_copy, "-q"])
    assert_refused(outcome, 2, "already holds a bundle")
    assert "--force" in outcome.err


@pytest.mark.usefixtures("traced_once")
def test_force_replaces_a_bundle_only_by_a_finished_one(
    bundle_copy: Path, invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = ["build", "--size", "tiny", "-o", bundle_copy, "-q", "--force", "--parity", "none"]
    before = (bundle_copy / "manifest.json").read_text()
    with monkeypatch.context() as patch:
        fill_disk(patch)
        assert_refused(invoke(build), 1, "No space left")
    assert (bundle_copy / "manifest.json").read_text() == before
    assert invoke(["verify", bundle_copy]).code == 0
    assert invoke(build) == Outcome(0, "", "")
    assert json.loads((bundle_copy / "manifest.json").read_text())["parity"]["verdict"] == "not run"
    assert invoke(["verify", bundle_copy]).code == 0
    only(bundle_copy.parent, bundle_copy.name)
