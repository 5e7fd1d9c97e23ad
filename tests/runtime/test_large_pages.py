"""Bringing a file into memory in large pages; whether it has such is the system's affair."""

import ctypes
import mmap
import sys
from pathlib import Path

import numpy as np
import pytest

from gemma_export.graphs.direct_file import DirectFile
from gemma_export.runtime.large_pages import bring_in

linux = pytest.mark.skipif(sys.platform != "linux", reason="advice of Linux's")


def pages_in_memory(path: Path) -> int:
    """How many pages of a file are in memory."""
    mincore = ctypes.CDLL(None, use_errno=True).mincore
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as pages:
        whole = np.frombuffer(pages, np.uint8)
        found = np.zeros(-(-whole.size // mmap.PAGESIZE), np.uint8)
        address = ctypes.c_void_p(whole.ctypes.data)
        assert mincore(address, ctypes.c_size_t(whole.size), ctypes.c_void_p(found.ctypes.data)) == 0
        del whole
    return int((found & 1).sum())


@linux
def test_whole_file_is_brought_in(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    numbers = np.arange(1 << 20, dtype=np.int64)
    with DirectFile(path) as file:
        file.write(memoryview(numbers).cast("B"))
    bring_in(path)
    assert pages_in_memory(path) == numbers.nbytes // mmap.PAGESIZE
    assert path.read_bytes() == numbers.tobytes()


@pytest.mark.parametrize("size", [0, 1, 4097])
def test_any_size(tmp_path: Path, size: int) -> None:
    path = tmp_path / "weights"
    path.write_bytes(bytes(size))
    bring_in(path)
    assert path.read_bytes() == bytes(size)


@linux
@pytest.mark.parametrize("advice", ["MADV_HUGEPAGE", "_POPULATE_READ"])
def test_system_that_refuses_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, advice: str
) -> None:
    path = tmp_path / "weights"
    path.write_bytes(bytes(1 << 16))
    unknown = 9999
    with (
        path.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as pages,
        pytest.raises(OSError, match="Invalid argument"),
    ):
        pages.madvise(unknown)
    if advice == "MADV_HUGEPAGE":
        monkeypatch.setattr(mmap, advice, unknown)
    else:
        monkeypatch.setattr(f"gemma_export.runtime.large_pages.{advice}", unknown)
    bring_in(path)


def test_system_without_them_does_not_even_open_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    bring_in(tmp_path / "is not there")
