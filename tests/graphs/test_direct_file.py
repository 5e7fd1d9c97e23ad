"""A file written past the page cache holds the same bytes, on every kind of file system."""

import errno
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_export.graphs import direct_file
from gemma_export.graphs.direct_file import STAGE_BYTES, DirectFile

TMPFS = Path("/dev/shm")


def written(path: Path, sizes: list[int]) -> bytes:
    expected = b""
    with DirectFile(path) as file:
        for number, size in enumerate(sizes):
            block = bytes([number % 251 + 1]) * size
            file.write(memoryview(block))
            expected += block
    return expected


@settings(max_examples=30, deadline=None)
@given(sizes=st.lists(st.integers(0, 3 * 4096), max_size=8))
def test_small_blocks_of_any_size(sizes: list[int], tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("direct") / "file"
    assert written(path, sizes) == path.read_bytes()


@pytest.mark.parametrize(
    "sizes",
    [[STAGE_BYTES], [STAGE_BYTES - 1, 2], [STAGE_BYTES + 1], [2 * STAGE_BYTES + 4096, 5], [1, STAGE_BYTES]],
    ids=["one stage", "over the end", "one more", "several", "unaligned"],
)
def test_blocks_around_the_stage(sizes: list[int], tmp_path: Path) -> None:
    assert written(tmp_path / "file", sizes) == (tmp_path / "file").read_bytes()


@pytest.mark.skipif(not TMPFS.is_dir(), reason="no tmpfs")
def test_file_system_in_memory() -> None:
    path = TMPFS / f"gemma-export-{os.getpid()}"
    try:
        assert written(path, [5000, STAGE_BYTES]) == path.read_bytes()
    finally:
        path.unlink(missing_ok=True)


@pytest.mark.parametrize("where", ["open", "write"])
def test_file_system_without_direct_writes(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = []
    real_open, real_write = os.open, os.write

    def open_(path: Path, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_DIRECT and where == "open":
            refused.append(path)
            raise OSError(errno.EINVAL, "no direct writes")
        return real_open(path, flags, mode)

    def write(descriptor: int, data: memoryview) -> int:
        if where == "write" and not refused:
            refused.append(descriptor)
            raise OSError(errno.EINVAL, "no direct writes")
        return real_write(descriptor, data)

    monkeypatch.setattr(direct_file.os, "open", open_)
    monkeypatch.setattr(direct_file.os, "write", write)
    assert written(tmp_path / "file", [STAGE_BYTES, 7]) == (tmp_path / "file").read_bytes()
    assert len(refused) == 1


def test_partial_writes_lose_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    # Odd sizes: what follows is no longer aligned and must leave the direct mode.
    monkeypatch.setattr(direct_file.os, "write", lambda d, data: real(d, data[: min(len(data), 100_001)]))
    # A direct write of an odd size is refused by the file system itself, which is the other way out.
    assert written(tmp_path / "file", [STAGE_BYTES, 12_345]) == (tmp_path / "file").read_bytes()


def test_full_disk_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(descriptor: int, data: memoryview) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(direct_file.os, "write", write)
    with pytest.raises(OSError, match="No space"):
        written(tmp_path / "file", [10])
