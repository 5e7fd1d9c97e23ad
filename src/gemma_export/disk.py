"""What a disk refuses, as a sentence."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gemma_export.errors import StorageError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_UNUSABLE = (
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EEXIST,
    errno.ENAMETOOLONG,
    errno.ELOOP,
)


@contextmanager
def disk_errors(output: Path) -> Iterator[None]:
    """Turns what a disk refuses while `output` is written into a sentence."""
    try:
        yield
    except BrokenPipeError:  # Not a disk: whoever read our output went away.
        raise
    except OSError as error:
        reason = error.strerror or error
        if error.errno in _FULL:
            raise StorageError(
                f"The disk with {output} takes no more: {reason}.",
                "Nothing was kept. Free some space, or choose another disk with -o.",
            ) from error
        if error.errno in _UNUSABLE:
            raise StorageError(
                f"{output} cannot be written: {reason}.", "Choose a folder that you may write to with -o."
            ) from error
        raise StorageError(
            f"Writing {output} failed: {reason}.", "Check the disk, then try again."
        ) from error
