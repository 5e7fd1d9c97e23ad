"""A file that is written once, from front to back, past the system's page cache.

What a build writes is larger than what it reads again soon; through the cache every page of it would be
allocated, copied and given back, at the expense of whatever else was in there. Where the file system has no
direct writes (tmpfs, some network ones), the file is written the usual way.
"""

import errno
import fcntl
import mmap
import os
from pathlib import Path
from types import TracebackType

ALIGNMENT = 4096
"""Offsets, sizes and addresses of direct writes are multiples of this: the page, and any disk's sector."""
STAGE_BYTES = 4 << 20
"""What is collected before it is written."""

_UNSUPPORTED = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP)


class DirectFile:
    """A new file; `write` appends to it, and it is complete when the context is left.

    Args:
        path: Must not be there, or is replaced.

    Raises:
        OSError: The disk is full or refuses, from any of the methods.
    """

    def __init__(self, path: Path) -> None:
        self._view = memoryview(mmap.mmap(-1, STAGE_BYTES))  # Anonymous memory begins at a page.
        self._filled = 0
        self._written = 0
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        try:
            self._file = os.open(path, flags | getattr(os, "O_DIRECT", 0), 0o666)
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
            self._file = os.open(path, flags, 0o666)

    def __enter__(self) -> "DirectFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            os.close(self._file)

    def write(self, block: memoryview) -> None:
        """Appends bytes, of any number and at any address."""
        while block:
            taken = min(len(block), STAGE_BYTES - self._filled)
            self._view[self._filled : self._filled + taken] = block[:taken]
            self._filled += taken
            block = block[taken:]
            if self._filled == STAGE_BYTES:
                self._flush(STAGE_BYTES)

    def _flush(self, size: int) -> None:
        done = 0
        while done < size:  # A disk that is nearly full takes only part of it.
            try:
                count = os.write(self._file, self._view[done:size])
            except OSError as error:
                if error.errno not in _UNSUPPORTED or not self._is_direct():
                    raise
                self._leave_direct()
                continue
            done += count
            if count % ALIGNMENT:
                self._leave_direct()
        self._written += done
        self._filled = 0

    def _finish(self) -> None:
        """Writes what is left, padded to what a direct write takes, and cuts the padding off again."""
        size = self._written + self._filled
        padded = -(-self._filled // ALIGNMENT) * ALIGNMENT
        self._view[self._filled : padded] = bytes(padded - self._filled)
        self._flush(padded)
        os.ftruncate(self._file, size)

    def _is_direct(self) -> bool:
        return bool(fcntl.fcntl(self._file, fcntl.F_GETFL) & getattr(os, "O_DIRECT", 0))

    def _leave_direct(self) -> None:
        """Goes on through the page cache: the file system refuses, or a write ended between two sectors."""
        flags = fcntl.fcntl(self._file, fcntl.F_GETFL)
        fcntl.fcntl(self._file, fcntl.F_SETFL, flags & ~getattr(os, "O_DIRECT", 0))
