"""A bundle as one file: the same bytes for the same bundle, and nothing unchecked comes out of it."""

import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.damage import cut, flip_byte
from support.disk import largest_file

from gemma_export.errors import BundleError, GemmaExportError, StorageError, UsageError
from gemma_export.runtime.archive import pack, unpack
from gemma_export.runtime.bundle import MANIFEST_NAME, open_bundle

Members = list[tuple[tarfile.TarInfo, bytes]]


@pytest.fixture
def packed(small_bundle: Path, tmp_path: Path) -> Path:
    """An archive of the small bundle."""
    pack(small_bundle, tmp_path / "bundle.tar")
    return tmp_path / "bundle.tar"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where to unpack to."""
    path = tmp_path / "folder"
    path.mkdir()
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def members(archive: Path) -> Members:
    with tarfile.open(archive) as tar:
        return [(member, tar.extractfile(member).read()) for member in tar]  # type: ignore[union-attr]


def write(archive: Path, members: Members) -> None:
    with tarfile.open(archive, "w", format=tarfile.PAX_FORMAT) as tar:
        for info, content in members:
            tar.addfile(info, io.BytesIO(content))


def rewritten(archive: Path, change: Callable[[Members], object]) -> Path:
    """The archive with other members."""
    found = members(archive)
    change(found)
    write(archive, found)
    return archive


def member(name: str, content: bytes = b"", **fields: Any) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, content


def refusal(archive: Path, folder: Path, error: type[GemmaExportError] = BundleError) -> str:
    with pytest.raises(error) as caught:
        unpack(archive, folder)
    assert caught.value.hint
    return caught.value.message


def test_comes_back_as_it_was(small_bundle: Path, packed: Path, folder: Path) -> None:
    manifest = unpack(packed, folder)
    assert contents(folder) == contents(small_bundle)
    assert open_bundle(folder).manifest == manifest


def test_engines_come_back_in_their_folder(engine_bundle: Path, tmp_path: Path, folder: Path) -> None:
    pack(engine_bundle, tmp_path / "b.tar")
    unpack(tmp_path / "b.tar", folder)
    assert contents(folder) == contents(engine_bundle)


def test_has_the_same_bytes_for_the_same_bundle(small_bundle: Path, packed: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in sorted(small_bundle.iterdir(), reverse=True):  # in another order
        shutil.copyfile(path, copy / path.name)  # at another time
        (copy / path.name).chmod(0o600)
    (copy / "notes.txt").write_text("not of the bundle")
    size = pack(copy, tmp_path / "again.tar")
    assert (tmp_path / "again.tar").read_bytes() == packed.read_bytes()
    assert size == packed.stat().st_size


def test_headers_say_nothing_of_the_machine(packed: Path) -> None:
    found = [info for info, _ in members(packed)]
    names = [info.name for info in found]
    assert names[0] == MANIFEST_NAME
    assert names[1:] == sorted(names[1:])
    assert {(info.mtime, info.uid, info.gid, info.uname, info.gname, info.mode) for info in found} == {
        (0, 0, 0, "", "", 0o644)
    }


def test_progress_is_told_to_the_last_byte(small_bundle: Path, tmp_path: Path, folder: Path) -> None:
    told: list[tuple[int, int]] = []
    pack(small_bundle, tmp_path / "b.tar", progress=lambda done, total: told.append((done, total)))
    total = sum(entry.size for entry in open_bundle(small_bundle).manifest.files.values())
    assert told[-1] == (total, total)
    told.clear()
    unpack(tmp_path / "b.tar", folder, lambda done, total: told.append((done, total)))
    assert told[-1] == (total, total)


def test_only_what_a_device_needs(engine_bundle: Path, tmp_path: Path, folder: Path) -> None:
    whole = pack(engine_bundle, tmp_path / "whole.tar")
    size = pack(engine_bundle, tmp_path / "engines.tar", engines_only=True)
    manifest = unpack(tmp_path / "engines.tar", folder)
    opened = open_bundle(engine_bundle)
    engines = {engine.file for engine in opened.manifest.engines}
    assert engines < set(manifest.files) < set(opened.manifest.files)
    assert manifest.engines == opened.manifest.engines
    assert "tokenizer.model" in manifest.files
    assert opened.manifest.graph.file not in manifest.files
    assert set(contents(folder)) == {*manifest.files, MANIFEST_NAME}
    assert open_bundle(folder).extra == ()
    assert size < whole


def test_engines_only_of_a_bundle_without_engines(small_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="has no engines") as refused:
        pack(small_bundle, tmp_path / "b.tar", engines_only=True)
    assert "gemma-export compile" in refused.value.hint
    assert list(tmp_path.iterdir()) == []


# Packing what is damaged


def test_damaged_bundle_is_not_packed(small_bundle: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(small_bundle, tmp_path / "bundle"))
    flip_byte(bundle / "model.onnx.data", 5000)
    with pytest.raises(BundleError, match=r"model\.onnx\.data has been changed"):
        pack(bundle, tmp_path / "b.tar")
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_older_archive_stays_when_packing_fails(small_bundle: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(small_bundle, tmp_path / "bundle"))
    flip_byte(bundle / "tokenizer.model", 50)
    (tmp_path / "b.tar").write_bytes(b"older")
    with pytest.raises(BundleError):
        pack(bundle, tmp_path / "b.tar")
    assert (tmp_path / "b.tar").read_bytes() == b"older"


def test_full_disk_while_packing_leaves_nothing(small_bundle: Path, tmp_path: Path) -> None:
    with largest_file(100_000), pytest.raises(StorageError, match="takes no more"):
        pack(small_bundle, tmp_path / "b.tar")
    assert list(tmp_path.iterdir()) == []


# Unpacking what is damaged, or made to harm


def test_flipped_byte_is_found(packed: Path, folder: Path) -> None:
    with tarfile.open(packed) as tar:
        offset = tar.getmember("tokenizer.model").offset_data
    flip_byte(packed, offset + 1000)
    assert "tokenizer.model is not what the manifest says" in refusal(packed, folder)


@pytest.mark.parametrize("missing", [2000, 20_000, 200_000])
def test_archive_that_was_cut_short(missing: int, packed: Path, folder: Path) -> None:
    size = packed.stat().st_size
    padding = 10240 + 1024  # the end of the last record, and two blocks that mark the end
    cut(packed, min(padding + missing, size - 4000))
    assert "cut short" in refusal(packed, folder)


def test_archive_without_its_last_file(packed: Path, folder: Path) -> None:
    rewritten(packed, lambda found: found.pop())
    assert "ends before tokenizer.model" in refusal(packed, folder)


UNSAFE: dict[str, tuple[Callable[[Members], object], str]] = {
    "outside the folder": (
        lambda found: found.append(member("../evil", b"x")),
        "'../evil', which its manifest does not list",
    ),
    "at a fixed place": (
        lambda found: found.append(member("/tmp/evil", b"x")),
        "which its manifest does not list",
    ),
    "a second manifest": (
        lambda found: found.append(member(MANIFEST_NAME, b"{}")),
        "'manifest.json', which its manifest does not list",
    ),
    "twice": (lambda found: found.append(found[1]), "twice"),
    "link": (
        lambda found: found.insert(1, member("model.onnx", type=tarfile.SYMTYPE, linkname="/etc/passwd")),
        "model.onnx is not a file",
    ),
    "hard link": (
        lambda found: found.insert(1, member("model.onnx", type=tarfile.LNKTYPE, linkname="manifest.json")),
        "model.onnx is not a file",
    ),
    "folder": (
        lambda found: found.insert(1, member("model.onnx", type=tarfile.DIRTYPE)),
        "model.onnx is not a file",
    ),
    "device": (
        lambda found: found.insert(1, member("model.onnx", type=tarfile.CHRTYPE)),
        "model.onnx is not a file",
    ),
    "another size": (
        lambda found: found.insert(1, member("model.onnx", b"short")),
        "model.onnx has 5 bytes",
    ),
    "manifest last": (lambda found: found.append(found.pop(0)), "does not begin with manifest.json"),
    "manifest is a link": (
        lambda found: found.insert(0, member(MANIFEST_NAME, type=tarfile.SYMTYPE, linkname="/etc/passwd")),
        "does not begin with manifest.json",
    ),
    "nothing": (lambda found: found.clear(), "does not begin with manifest.json"),
}


@pytest.mark.parametrize("name", UNSAFE)
def test_unsafe_archives(name: str, packed: Path, folder: Path) -> None:
    change, words = UNSAFE[name]
    beside = {*folder.parent.iterdir()}
    assert words in refusal(rewritten(packed, change), folder)
    assert {*folder.parent.iterdir()} == beside
    assert not any(path.is_symlink() for path in folder.rglob("*"))


@pytest.mark.parametrize(
    ("listed", "words"),
    [
        ("../evil", "no path inside the bundle"),
        ("/tmp/evil", "no path inside the bundle"),
        ("a/../../evil", "no path inside the bundle"),
        ("\ud800", "no path inside the bundle"),
        ("tokenizer.model/evil", "inside what it lists as a file"),
    ],
)
def test_manifest_that_lists_a_path_elsewhere(listed: str, words: str, packed: Path, folder: Path) -> None:
    def change(found: Members) -> None:
        values = json.loads(found[0][1])
        values["files"][listed] = values["files"]["tokenizer.model"]
        found[0] = member(MANIFEST_NAME, json.dumps(values).encode())

    assert words in refusal(rewritten(packed, change), folder)
    assert list(folder.iterdir()) == []


def test_what_is_no_archive(small_bundle: Path, tmp_path: Path, folder: Path) -> None:
    assert "is no archive of a bundle" in refusal(small_bundle / "model.onnx", folder)
    (tmp_path / "empty.tar").touch()
    assert "is no archive of a bundle" in refusal(tmp_path / "empty.tar", folder)
    assert "There is no file" in refusal(tmp_path / "nowhere.tar", folder, UsageError)
    assert "is a folder" in refusal(tmp_path, folder, UsageError)


def test_disk_without_room_is_found_before_anything_large_is_written(
    packed: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    assert "0.00 GB free" in refusal(packed, folder, StorageError)
    assert os.listdir(folder) in ([], [MANIFEST_NAME])
