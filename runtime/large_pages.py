"""Weights in large pages: to look up each of a file's pages of 4 KB costs decoding a few per cent.

Which pages a file lies in is settled when it is read from the disk: what maps it later finds it so.
"""

import mmap
from contextlib import suppress
from pathlib import Path

_POPULATE_READ = 22
"""Linux's MADV_POPULATE_READ, which Python's mmap does not name: every page is brought in and mapped."""


def bring_in(path: Path) -> None:
    """Reads a file into memory in large pages, as far as it is not there yet.

    That takes what its first reader would have waited for. Where the system has no such pages, it is
    read in small ones or not at all: Linux has them for files on XFS from 5.18 on, on ext4 from 6.16 on.

    Args:
        path: A file that is about to be mapped and read from end to end.
    """
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return
    # An empty file cannot be mapped; an older system knows one advice or the other not.
    with (
        path.open("rb") as file,
        suppress(OSError, ValueError),
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as pages,
    ):
        pages.madvise(mmap.MADV_HUGEPAGE)
        pages.madvise(_POPULATE_READ)
