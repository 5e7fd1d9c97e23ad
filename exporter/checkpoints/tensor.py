"""Tensors that are read in blocks of rows, when they are needed, and never kept.

Files are read, not mapped: a mapped page counts as this process's memory for as long as the mapping lives,
and a file that shrinks under a mapping kills the process instead of raising an error.
"""

import os
from dataclasses import dataclass
from io import FileIO
from math import prod
from pathlib import Path

import torch

from gemma_export.errors import CheckpointError
from gemma_export.graphs.tensors import RowSource

DOWNLOAD_AGAIN = "The download was probably interrupted: download the checkpoint again."


LazyTensor = RowSource
"""A weight of a checkpoint: known by name, shape and dtype, read in blocks of rows. It is what a graph's
initializers are streamed from, so the two are one protocol."""


@dataclass(frozen=True)
class FileStamp:
    """What tells that a file is still the one that was opened."""

    size: int
    modified_ns: int


@dataclass(frozen=True)
class FileTensor:
    """A tensor that lies in a file, row-major and without gaps.

    Args:
        name: Its name in the checkpoint.
        shape: Its shape.
        dtype: Its dtype.
        path: The file.
        offset: Where in the file it begins, in bytes.
        stamp: The file when it was opened.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    path: Path
    offset: int
    stamp: FileStamp

    @property
    def nbytes(self) -> int:
        """How many bytes of the file it takes."""
        return prod(self.shape) * self.dtype.itemsize

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop); a tensor without axes has one row.

        Raises:
            CheckpointError: The file is gone, or is not the one that was opened.
        """
        check_rows(self, start, stop)
        block = torch.empty((stop - start, *self.shape[1:]), dtype=self.dtype)
        if block.numel() == 0:
            return block
        buffer = bytes_of(block)
        with open_file(self.path) as file:
            if stamp_of(file) != self.stamp:
                raise CheckpointError(
                    f"{self.path} was changed while it was being read.",
                    "Start again once nothing writes to it.",
                )
            file.seek(self.offset + start * (len(buffer) // (stop - start)))
            read_exactly(file, buffer, self.path)
        return block


@dataclass(frozen=True)
class RowSlice:
    """Rows [start, stop) of another tensor, as a tensor of their own.

    Args:
        source: The tensor they are rows of.
        start: First row.
        stop: One past the last row.
    """

    source: LazyTensor
    start: int
    stop: int

    @property
    def name(self) -> str:
        """The source's name, and which rows."""
        return f"{self.source.name}[{self.start}:{self.stop}]"

    @property
    def shape(self) -> tuple[int, ...]:
        """As many rows as were asked for, each as wide as the source's."""
        return (self.stop - self.start, *self.source.shape[1:])

    @property
    def dtype(self) -> torch.dtype:
        """The source's."""
        return self.source.dtype

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) of the slice."""
        check_rows(self, start, stop)
        return self.source.read(self.start + start, self.start + stop)


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor, of any dtype: NumPy has no bfloat16, but it has bytes."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def rows_of(tensor: LazyTensor) -> int:
    """How many rows a tensor has: its axis 0, or one when it has no axes."""
    return tensor.shape[0] if tensor.shape else 1


def check_rows(tensor: LazyTensor, start: int, stop: int) -> None:
    """Sees to it that rows exist; anything else is a defect of the caller.

    Raises:
        IndexError: They do not.
    """
    if not 0 <= start <= stop <= rows_of(tensor):
        raise IndexError(f"rows {start}:{stop} of {tensor.name}, which has {rows_of(tensor)}")


def open_file(path: Path) -> FileIO:
    """Opens a checkpoint's file for reading, unbuffered.

    Raises:
        CheckpointError: It is missing, a link to nothing, or unreadable.
    """
    try:
        return open(path, "rb", buffering=0)
    except FileNotFoundError as error:
        if path.is_symlink():
            raise CheckpointError(f"{path} is a link to a file that is not there.", DOWNLOAD_AGAIN) from error
        raise CheckpointError(f"There is no {path}.", "Check the path given to --checkpoint.") from error
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be opened: {error.strerror or error}.", "Check the path and its permissions."
        ) from error


def stamp_of(file: FileIO) -> FileStamp:
    """The stamp of an open file."""
    status = os.fstat(file.fileno())
    return FileStamp(status.st_size, status.st_mtime_ns)


def read_exactly(file: FileIO, buffer: memoryview, path: Path) -> None:
    """Fills a buffer from a file's position on.

    Raises:
        CheckpointError: The file ends before that, or cannot be read.
    """
    done = 0
    while done < len(buffer):  # one call reads 2 GiB at most
        try:
            count = file.readinto(buffer[done:])
        except OSError as error:
            raise CheckpointError(
                f"{path} cannot be read: {error.strerror or error}.", "Check the disk it is on."
            ) from error
        if not count:
            raise CheckpointError(f"{path} is cut short.", DOWNLOAD_AGAIN)
        done += count
