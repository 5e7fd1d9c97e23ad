"""A bundle is either finished or not there."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from support.folders import names

from gemma_export.errors import BundleError, StorageError, UsageError
from gemma_export.exporter import bundle
from gemma_export.exporter.bundle import (
    check_replaceable,
    check_room,
    describe_files,
    is_bundle,
    new_bundle,
    write_manifest,
)
from gemma_export.runtime.bundle import FileEntry, Manifest, hash_file, open_bundle

MANIFEST = '{"format": "gemma-export-bundle"}'


def make_bundle(folder: Path, name: str = "model") -> Path:
    """What counts as a bundle when it comes to replacing it."""
    folder.mkdir()
    (folder / "manifest.json").write_text(MANIFEST)
    (folder / name).write_text(name)
    return folder


def build(output: Path, *, force: bool = False, name: str = "model") -> None:
    with new_bundle(output, force=force) as folder:
        (folder / "manifest.json").write_text(MANIFEST)
        (folder / name).write_text(name)


def test_appears_when_it_is_finished(tmp_path: Path) -> None:
    output = tmp_path / "some" / "where" / "b"
    with new_bundle(output, force=False) as folder:
        assert folder.parent == output.parent
        assert folder.name.startswith(".")
        (folder / "manifest.json").write_text(MANIFEST)
        assert not output.exists()
    assert names(output) == ["manifest.json"]
    assert names(output.parent) == ["b"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_leaves_nothing_when_it_fails(error: type[BaseException], tmp_path: Path) -> None:
    def fail() -> None:
        with new_bundle(tmp_path / "b", force=False) as folder:
            (folder / "model").write_text("half")
            raise error

    with pytest.raises(error):
        fail()
    assert names(tmp_path) == []


def test_takes_the_place_of_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    build(tmp_path / "b")
    assert names(tmp_path / "b") == ["manifest.json", "model"]
    assert names(tmp_path) == ["b"]


def test_relative_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    build(Path("b"))
    assert names(tmp_path) == ["b"]


def test_replaces_a_bundle_with_force(tmp_path: Path) -> None:
    output = make_bundle(tmp_path / "b", "old")
    with pytest.raises(UsageError, match="already holds a bundle"):
        build(output)
    build(output, force=True, name="new")
    assert names(output) == ["manifest.json", "new"]
    assert names(tmp_path) == ["b"]


def test_refuses_what_someone_put_there_meanwhile(tmp_path: Path) -> None:
    output = tmp_path / "b"

    def build_slowly() -> None:
        with new_bundle(output, force=True) as folder:
            (folder / "manifest.json").write_text(MANIFEST)
            output.mkdir()
            (output / "thesis.txt").write_text("years of work")

    with pytest.raises(UsageError, match="not a bundle"):
        build_slowly()
    assert names(output) == ["thesis.txt"]
    assert names(tmp_path) == ["b"]


def test_one_build_at_a_time(tmp_path: Path) -> None:
    output = tmp_path / "b"
    with new_bundle(output, force=False) as folder:
        (folder / "manifest.json").write_text(MANIFEST)
        with pytest.raises(UsageError, match="Another build is writing"):
            build(output)
        assert names(folder) == ["manifest.json"]
    assert names(tmp_path) == ["b"]


def test_two_outputs_do_not_wait_for_each_other(tmp_path: Path) -> None:
    with new_bundle(tmp_path / "a", force=False) as folder:
        (folder / "manifest.json").write_text(MANIFEST)
        build(tmp_path / "b")
    assert names(tmp_path) == ["a", "b"]


KILLED = """
import os, signal, sys
from pathlib import Path
from gemma_export.exporter.bundle import new_bundle
with new_bundle(Path(sys.argv[1]), force=False) as folder:
    (folder / "model.onnx.data").write_bytes(bytes(1000))
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_killed_build_is_cleared_by_the_next(tmp_path: Path) -> None:
    output = tmp_path / "b"
    ended = subprocess.run([sys.executable, "-c", KILLED, str(output)], check=False)
    assert ended.returncode == -9
    assert names(tmp_path) == [".b.lock", ".b.partial"]
    build(output)
    assert names(output) == ["manifest.json", "model"]
    assert names(tmp_path) == ["b"]


def test_bundle_that_was_being_replaced_comes_back(tmp_path: Path) -> None:
    # Killed between the two renames.
    make_bundle(tmp_path / ".b.old", "old")
    make_bundle(tmp_path / ".b.partial", "new")
    with pytest.raises(UsageError, match="already holds a bundle"):
        build(tmp_path / "b")
    assert names(tmp_path / "b") == ["manifest.json", "old"]
    # Killed after both.
    make_bundle(tmp_path / ".b.old", "older")
    build(tmp_path / "b", force=True, name="new")
    assert names(tmp_path / "b") == ["manifest.json", "new"]
    assert names(tmp_path) == ["b"]


def test_old_bundle_stays_when_the_new_one_cannot_be_renamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = make_bundle(tmp_path / "b", "old")
    rename = Path.rename

    def fail(self: Path, target: Path) -> Path:
        if self.name.endswith(".partial"):
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(StorageError, match="Input/output error"):
        build(output, force=True)
    assert names(output) == ["manifest.json", "old"]
    assert names(tmp_path) == ["b"]


def test_bundle_without_a_manifest_is_a_defect(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="without a manifest"), new_bundle(tmp_path / "b", force=False):
        pass
    assert names(tmp_path) == []


def test_output_that_cannot_be_looked_at(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="File name too long"):
        check_replaceable(tmp_path / ("x" * 300), force=False)


@pytest.mark.parametrize(
    ("manifest", "expected"),
    [(MANIFEST, True), (MANIFEST.replace("}", ', "format_version": 9}'), True), ("{}", False), (None, False)],
    ids=["ours", "newer", "another", "none"],
)
def test_is_bundle(manifest: str | None, expected: bool, tmp_path: Path) -> None:
    if manifest is not None:
        (tmp_path / "manifest.json").write_text(manifest)
    assert is_bundle(tmp_path) is expected


def test_room(tmp_path: Path) -> None:
    check_room(tmp_path, 0)
    with pytest.raises(StorageError, match=r"needs 1000000\.07 GB"):
        check_room(tmp_path, 10**15)


def test_room_that_is_missing_is_seen_in_the_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")._replace(free=30 * 10**6)
    monkeypatch.setattr(bundle.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(StorageError) as refused:
        check_room(tmp_path, 20 * 10**6)
    needed, free = re.findall(r"(\d+\.\d\d) GB", refused.value.message)
    assert float(needed) > float(free)


def test_files_are_described(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "file").write_bytes(b"abc")
    (tmp_path / "known").write_bytes(b"never read")
    (tmp_path / "manifest.json").write_text("{}")
    known = FileEntry(7, "hash")
    files = describe_files(tmp_path, {"known": known})
    assert files == {
        "inner/file": FileEntry(3, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"),
        "known": known,
    }


def test_manifest_of_a_path_that_is_not_utf8(tiny_bundle: Path, tmp_path: Path) -> None:
    manifest = Manifest.from_json((tiny_bundle / "manifest.json").read_text())
    source = os.fsdecode(b"caf\xe9")
    strange = replace(manifest, checkpoint=replace(manifest.checkpoint, source=source))
    write_manifest(tmp_path, strange)
    text = (tmp_path / "manifest.json").read_text(encoding="utf-8")
    assert json.loads(text)["checkpoint"]["source"] == source
    assert Manifest.from_json(text) == strange
    assert names(tmp_path) == ["manifest.json"]


def test_manifest_lists_every_file(tiny_bundle: Path) -> None:
    opened = open_bundle(tiny_bundle)
    assert opened.extra == ()
    assert sorted([*opened.manifest.files, "manifest.json"]) == names(tiny_bundle)
    for name, entry in opened.manifest.files.items():
        assert entry == FileEntry((tiny_bundle / name).stat().st_size, hash_file(tiny_bundle / name))
