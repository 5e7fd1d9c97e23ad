"""Writes a bundle so that it is either finished or not there.

Everything is written into a hidden folder beside the final name, under a lock; the last step is a rename. A
build that dies, by an error, Ctrl-C or kill -9, leaves nothing under the bundle's name, and the next build
clears what it left.
"""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from gemma_export.disk import disk_errors
from gemma_export.errors import BundleError, StorageError, UsageError
from gemma_export.runtime.bundle import MANIFEST_NAME, FileEntry, Manifest, hash_file
from gemma_export.runtime.manifest import FORMAT

MARGIN_BYTES = 64 << 20
"""Room for everything in a bundle that is not its weights."""


@contextmanager
def new_bundle(output: Path, *, force: bool) -> Iterator[Path]:
    """A folder to write a bundle into, which takes its final name when the body ends without an error.

    Args:
        output: The bundle's folder.
        force: Replace an older bundle.

    Yields:
        The hidden folder; `write_manifest` must have been called in it before the body ends.

    Raises:
        UsageError: The output exists and may not be replaced, or another build is writing it.
        StorageError: The disk refuses.
    """
    output = Path(os.path.abspath(output))
    partial = output.with_name(f".{output.name}.partial")
    with disk_errors(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        with _locked(output):
            _clear_leftovers(output, partial)
            check_replaceable(output, force=force)
            partial.mkdir()
            try:
                yield partial
                check_replaceable(output, force=force)  # Someone may have put something there meanwhile.
                _put_in_place(partial, output)
            finally:
                shutil.rmtree(partial, ignore_errors=True)


def check_replaceable(output: Path, *, force: bool) -> None:
    """Refuses to build where something else is.

    Raises:
        UsageError: The output is a file, a folder that is not a bundle, or a bundle without `force`.
        StorageError: What is there cannot be looked at.
    """
    with disk_errors(output):
        if output.is_symlink() or (output.exists() and not output.is_dir()):
            raise UsageError(f"{output} exists and is not a folder.", "Choose another name with -o.")
        if not output.exists() or not any(output.iterdir()):
            return
    if not is_bundle(output):
        raise UsageError(
            f"{output} exists and is not a bundle, so it will not be touched.", "Choose another name with -o."
        )
    if not force:
        raise UsageError(
            f"{output} already holds a bundle.", "Add --force to replace it, or choose another name with -o."
        )


def is_bundle(folder: Path) -> bool:
    """Whether a folder was written by this program, in this or another version of the format."""
    manifest = folder / MANIFEST_NAME
    try:
        return manifest.is_file() and FORMAT in manifest.read_text("utf-8", errors="replace")[:200]
    except OSError:
        return False


def check_room(folder: Path, needed: int) -> None:
    """Refuses a build whose weights will not fit, before writing them.

    Raises:
        StorageError: Too little is free.
    """
    needed += MARGIN_BYTES
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise StorageError(
            f"The bundle needs {needed / 1e9:.2f} GB and the disk with {folder.parent} has "
            f"{free / 1e9:.2f} GB free.",
            "Free some space, choose another disk with -o, or a smaller --precision.",
        )


def describe_files(folder: Path, known: dict[str, FileEntry]) -> dict[str, FileEntry]:
    """Size and hash of every file of a bundle but the manifest; `known` are not read again."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    names = [path.relative_to(folder).as_posix() for path in paths]
    return {
        name: known.get(name) or FileEntry(path.stat().st_size, hash_file(path))
        for name, path in zip(names, paths, strict=True)
        if name != MANIFEST_NAME
    }


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes the manifest, whole or not at all."""
    draft = folder / f"{MANIFEST_NAME}.new"
    # A checkpoint's path may hold bytes that are not UTF-8; their escapes are valid JSON.
    draft.write_text(manifest.to_json(), encoding="utf-8", errors="backslashreplace")
    draft.replace(folder / MANIFEST_NAME)


def _put_in_place(partial: Path, output: Path) -> None:
    """Renames a finished folder to its final name, over an older bundle or an empty folder."""
    if not (partial / MANIFEST_NAME).is_file():
        raise BundleError("The build ended without a manifest.", "This is a defect: please report it.")
    if not is_bundle(output):  # It is not there, or empty.
        partial.rename(output)
        return
    # A folder cannot be renamed over one that is not empty: the old one steps aside first. A build that is
    # killed between the two renames leaves the old one there, and the next build puts it back.
    aside = _aside(output)
    output.rename(aside)
    try:
        partial.rename(output)
    finally:
        if not output.exists():
            aside.rename(output)
    shutil.rmtree(aside, ignore_errors=True)


def _aside(output: Path) -> Path:
    return output.with_name(f".{output.name}.old")


def _clear_leftovers(output: Path, partial: Path) -> None:
    """Clears what a build that was killed left, and puts back a bundle that it was just replacing."""
    aside = _aside(output)
    if aside.exists() and not output.exists():
        aside.rename(output)
    for leftover in (aside, partial):
        if leftover.exists():
            shutil.rmtree(leftover)


@contextmanager
def _locked(output: Path) -> Iterator[None]:
    """Holds the lock of an output folder; the system lets go of it even when the process is killed."""
    path = output.with_name(f".{output.name}.lock")
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(
                f"Another build is writing {output}.", "Wait for it, or choose another name with -o."
            ) from None
        if not _still_there(path, descriptor):  # The build before removed it while we waited to open it.
            raise UsageError(f"Another build has just written {output}.", "Try again.")
        try:
            yield
        finally:
            with suppress(OSError):
                path.unlink(missing_ok=True)
    finally:
        os.close(descriptor)


def _still_there(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False
