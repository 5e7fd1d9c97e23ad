"""A bundle as one file: a tar that has the same bytes for the same bundle, and is checked while it is read.

The manifest comes first, then every file it lists, sorted; times, owners and modes are all the same. So the
hash of each member is known before its first byte, in one pass and from a pipe too, and what is not listed
is refused. The format is POSIX pax, because an engine may be larger than the 8 GiB of older tars.
"""

import hashlib
import io
import os
import shutil
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import IO

from gemma_export.disk import disk_errors
from gemma_export.errors import BundleError, StorageError, UsageError
from gemma_export.runtime.bundle import Bundle, check_listed, open_bundle
from gemma_export.runtime.manifest import MANIFEST_NAME, FileEntry, Manifest

Progress = Callable[[int, int], None]
"""Called with bytes done and bytes in all."""

_BLOCK = 4 << 20
_MANIFEST_LIMIT = 64 << 20
_AGAIN = "Fetch or pack the archive again; it was changed or cut short."
_BUILD_AGAIN = "Build the bundle again; `gemma-export verify` checks all of it."
_UNSAFE = "Do not use this archive unless you know who made it; pack the bundle again."


def pack(bundle: Path, archive: Path, *, engines_only: bool = False, progress: Progress | None = None) -> int:
    """Packs a bundle, and checks every byte against its manifest on the way.

    Args:
        bundle: Its folder.
        archive: The file to write, whole or not at all; an older one is replaced.
        engines_only: Leave out what a device with the engines does not need: the graph and its weights, the
            configuration of a runtime that would read them, and the page with the parity report.
        progress: Told of bytes as they are packed.

    Returns:
        Size of the archive in bytes.

    Raises:
        BundleError: The bundle is damaged.
        UsageError: Only the engines were asked for, and there are none.
        StorageError: The disk refuses; nothing is left.
    """
    opened = open_bundle(bundle, check="sizes")
    manifest = opened.manifest
    text = (opened.path / MANIFEST_NAME).read_bytes()
    if engines_only:
        manifest = _engines_only(manifest, bundle)
        text = manifest.to_json().encode("utf-8", errors="backslashreplace")
    draft = archive.with_name(f".{archive.name}.partial")
    with disk_errors(archive):
        archive.parent.mkdir(parents=True, exist_ok=True)
        try:
            with (
                draft.open("wb") as file,
                # Of its own accord it copies 16 kB at a time.
                tarfile.TarFile(fileobj=file, mode="w", format=tarfile.PAX_FORMAT, copybufsize=_BLOCK) as tar,
            ):
                tar.addfile(_member(MANIFEST_NAME, len(text)), io.BytesIO(text))
                _add_files(tar, opened, manifest, progress)
            size = draft.stat().st_size
            draft.replace(archive)
        finally:
            draft.unlink(missing_ok=True)
    return size


def unpack(archive: Path, folder: Path, progress: Progress | None = None) -> Manifest:
    """Unpacks an archive into a folder that nobody reads yet, and checks every byte on the way.

    Args:
        archive: What `pack` wrote.
        folder: An empty folder. What is in it when this fails is unchecked: the caller removes it, and gives
            it its final name only when this ends without an error.
        progress: Told of bytes as they are written.

    Returns:
        The manifest.

    Raises:
        BundleError: The archive is damaged, cut short, unsafe, or none of a bundle.
        UsageError: There is no such file.
        StorageError: It cannot be read, or the disk has no room for what is in it.
        OSError: The disk refuses while it is written.
    """
    with _reading(archive) as tar:
        manifest = _read_manifest(tar, folder, archive)
        total = sum(entry.size for entry in manifest.files.values())
        _check_room(folder, total, archive)
        done = 0
        seen: set[str] = set()
        while (member := tar.next()) is not None:
            entry = _check_member(member, manifest, seen, archive)
            seen.add(member.name)
            content = tar.extractfile(member)
            assert content is not None  # It is a file.
            for written in _write_checked(content, folder / member.name, member.name, entry):
                done += written
                if progress is not None:
                    progress(done, total)
    if missing := sorted(manifest.files.keys() - seen):
        raise BundleError(f"{archive} ends before {missing[0]}.", _AGAIN)
    return open_bundle(folder, check="sizes").manifest


def _engines_only(manifest: Manifest, bundle: Path) -> Manifest:
    """A manifest that lists only what a device with the engines needs."""
    if not manifest.engines:
        raise UsageError(
            f"{bundle} has no engines.",
            "Leave --engines-only out, or run `gemma-export compile` first.",
        )
    # genai_config.json names the graph to another runtime.
    left_out = {manifest.graph.file, manifest.graph.weights_file, "genai_config.json", "parity.html"}
    files = {name: entry for name, entry in manifest.files.items() if name not in left_out}
    return replace(manifest, files=files)


def _member(name: str, size: int) -> tarfile.TarInfo:
    """A member's header, which says nothing of the machine it was packed on."""
    info = tarfile.TarInfo(name)
    info.size = size
    info.mode = 0o644
    return info


def _add_files(tar: tarfile.TarFile, bundle: Bundle, manifest: Manifest, progress: Progress | None) -> None:
    total = sum(entry.size for entry in manifest.files.values())
    done = 0
    for name, entry in sorted(manifest.files.items()):
        with (bundle.path / name).open("rb", buffering=0) as raw:
            file = _Hashed(raw, partial(_tell, progress, done, total))
            try:
                tar.addfile(_member(name, entry.size), file)
            except OSError as error:
                if error.errno is not None:
                    raise
                raise BundleError(f"{name} was cut short while it was packed.", _BUILD_AGAIN) from None
        if file.digest() != entry.sha256.lower():
            raise BundleError(
                f"{name} has been changed: its SHA-256 is {file.digest()[:12]}…, the manifest says "
                f"{entry.sha256[:12]}….",
                _BUILD_AGAIN,
            )
        done += entry.size


def _tell(progress: Progress | None, before: int, total: int, count: int) -> None:
    if progress is not None:
        progress(before + count, total)


class _Hashed(io.RawIOBase):
    """A file that is hashed as it is read."""

    def __init__(self, file: IO[bytes], told: Callable[[int], None]) -> None:
        self._file = file
        self._told = told
        self._hash = hashlib.sha256()
        self._count = 0

    def read(self, size: int = -1, /) -> bytes:
        """The next bytes."""
        data = self._file.read(size)
        self._hash.update(data)
        self._count += len(data)
        self._told(self._count)
        return data

    def digest(self) -> str:
        """The SHA-256 of what was read, in hexadecimal."""
        return self._hash.hexdigest()


@contextmanager
def _reading(archive: Path) -> Iterator[tarfile.TarFile]:
    """An archive that is read once, from front to end."""
    with _opened(archive) as file:
        try:
            with tarfile.open(fileobj=file, mode="r|", bufsize=_BLOCK) as tar:
                yield tar
        except tarfile.TarError as error:
            raise BundleError(
                f"{archive} is no archive of a bundle, or cut short: {error}.", _AGAIN
            ) from None


def _opened(archive: Path) -> IO[bytes]:
    try:
        return archive.open("rb")
    except FileNotFoundError:
        raise UsageError(f"There is no file {archive}.", "Check its path.") from None
    except IsADirectoryError:
        raise UsageError(f"{archive} is a folder.", "Give the file that `gemma-export pack` wrote.") from None
    except OSError as error:
        raise StorageError(
            f"{archive} cannot be read: {error.strerror}.", "Check its permissions."
        ) from error


def _read_manifest(tar: tarfile.TarFile, folder: Path, archive: Path) -> Manifest:
    first = tar.next()
    if first is None or first.name != MANIFEST_NAME or not _is_file(first):
        raise BundleError(
            f"{archive} is no archive of a bundle: it does not begin with {MANIFEST_NAME}.",
            "Give the file that `gemma-export pack` wrote.",
        )
    if first.size > _MANIFEST_LIMIT:
        raise BundleError(f"{MANIFEST_NAME} has {first.size} bytes; no manifest is that long.", _UNSAFE)
    content = tar.extractfile(first)
    assert content is not None  # It is a file.
    text = content.read()
    if len(text) != first.size:
        raise BundleError(f"{archive} is cut short within {MANIFEST_NAME}.", _AGAIN)
    try:
        manifest = Manifest.from_json(text.decode("utf-8"))
    except UnicodeDecodeError:
        raise BundleError(f"{MANIFEST_NAME} is not JSON: it is not UTF-8.", _AGAIN) from None
    check_listed(manifest)
    (folder / MANIFEST_NAME).write_bytes(text)
    return manifest


def _is_file(member: tarfile.TarInfo) -> bool:
    return member.type in (tarfile.REGTYPE, tarfile.AREGTYPE) and not member.issparse()


def _check_member(member: tarfile.TarInfo, manifest: Manifest, seen: set[str], archive: Path) -> FileEntry:
    """The manifest's entry of a member.

    Raises:
        BundleError: It is none: not listed, twice there, a link or a folder, or of another size.
    """
    entry = manifest.files.get(member.name)
    if entry is None:
        raise BundleError(f"{archive} has {member.name!r}, which its manifest does not list.", _UNSAFE)
    if member.name in seen:
        raise BundleError(f"{archive} has {member.name} twice.", _UNSAFE)
    if not _is_file(member):
        raise BundleError(f"{member.name} is not a file in {archive}.", _UNSAFE)
    if member.size != entry.size:
        raise BundleError(f"{member.name} has {member.size} bytes; the manifest says {entry.size}.", _AGAIN)
    return entry


def _write_checked(content: IO[bytes], path: Path, name: str, entry: FileEntry) -> Iterator[int]:
    """Writes a member, and yields how much after each block."""
    digest = hashlib.sha256()
    count = 0
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("xb", buffering=0) as file:
        while block := content.read(_BLOCK):
            view = memoryview(block)
            while view:
                view = view[file.write(view) :]
            digest.update(block)
            count += len(block)
            yield len(block)
    if count != entry.size:
        raise BundleError(f"The archive is cut short within {name}.", _AGAIN)
    if digest.hexdigest() != entry.sha256.lower():
        raise BundleError(
            f"{name} is not what the manifest says: its SHA-256 is {digest.hexdigest()[:12]}…, not "
            f"{entry.sha256[:12]}….",
            _AGAIN,
        )


def _check_room(folder: Path, needed: int, archive: Path) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise StorageError(
            f"{archive} needs {needed / 1e9:.2f} GB, and the disk with {os.fspath(folder.parent)} has "
            f"{free / 1e9:.2f} GB free.",
            "Free some space, or choose another disk with -o.",
        )
