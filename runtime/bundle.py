"""A bundle on disk: opened only when what is there is what its manifest says.

Everything is checked before anything is mapped: paths stay inside the folder and are no links, sizes and
hashes match, the format version is known. The manifest is not signed: this finds damage, a mix of two
bundles and a path that reaches out of the folder, not a forger who writes the manifest too.
"""

import hashlib
import os
import stat
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from gemma_export.errors import BundleError, UsageError
from gemma_export.runtime.manifest import (
    FORMAT,
    FORMAT_VERSION,
    MANIFEST_NAME,
    TOKENIZER_NAME,
    ByteCounts,
    CacheScales,
    CheckpointInfo,
    EngineInfo,
    FileEntry,
    GraphInfo,
    Manifest,
    ModelInfo,
    ParameterCounts,
    ParitySummary,
    ProfileInfo,
    QuantizationInfo,
    QuantizedTensor,
    Range,
    TensorSpec,
    TokenIds,
)

__all__ = [
    "FORMAT",
    "FORMAT_VERSION",
    "MANIFEST_NAME",
    "TOKENIZER_NAME",
    "Bundle",
    "ByteCounts",
    "CacheScales",
    "Check",
    "CheckpointInfo",
    "EngineInfo",
    "FileEntry",
    "GraphInfo",
    "Manifest",
    "ModelInfo",
    "ParameterCounts",
    "ParitySummary",
    "ProfileInfo",
    "QuantizationInfo",
    "QuantizedTensor",
    "Range",
    "TensorSpec",
    "TokenIds",
    "check_listed",
    "hash_file",
    "open_bundle",
]

Check = Literal["full", "quick", "sizes"]

LARGE_FILE = 64 << 20
"""Bytes from which the `quick` check looks at a file's size only."""

_BLOCK = 4 << 20
_MANIFEST_LIMIT = 64 << 20
_FETCH_AGAIN = "Fetch or copy the bundle again; it was changed or cut short after it was built."
_UNSAFE = "Do not use this bundle unless you know who made it; build it again from the checkpoint."


@dataclass(frozen=True)
class Bundle:
    """A bundle that has been checked.

    Attributes:
        path: Its folder, absolute.
        manifest: What it says of itself.
        extra: Files in the folder that the manifest does not list, relative, sorted. Nothing ever reads
            them, so they are told and not refused: a file manager's droppings must not break a bundle.
    """

    path: Path
    manifest: Manifest
    extra: tuple[str, ...]

    def file(self, name: str) -> Path:
        """The absolute path of a listed file.

        Raises:
            BundleError: The manifest does not list it.
        """
        if name not in self.manifest.files:
            raise BundleError(f"The bundle {self.path} has no {name}.", _FETCH_AGAIN)
        return self.path / name


def open_bundle(path: str | os.PathLike[str], check: Check = "full") -> Bundle:
    """Opens a bundle, after checking it.

    Args:
        path: The bundle's folder; the folder itself may be reached through a link.
        check: `full` hashes every file, at the speed of the disk or of SHA-256 (0.4 to 2 GB/s): seconds
            for a large model. `quick` hashes every file under 64 MiB (graph, tokenizer, configurations)
            and looks at the size of larger ones: what a load uses, because the weights are mapped and
            read on demand, and hashing them would read them all once more than the load itself does.
            A download that was cut short, a missing file and a graph of another build are all found by
            it; a flipped bit in the weights needs `full`, which `gemma-export verify` runs. `sizes`
            hashes nothing.

    Raises:
        BundleError: The folder is no bundle, damaged, unsafe or of a newer format.
        UsageError: `check` is none of the three.
    """
    if check not in ("full", "quick", "sizes"):
        raise UsageError(f"There is no check {check!r}.", "Use full, quick or sizes.")
    folder = Path(path)
    if not folder.is_dir():
        raise BundleError(
            f"{folder} is {'not a folder' if folder.exists() else 'not there'}.",
            "Give the folder that `gemma-export build` wrote.",
        )
    folder = folder.resolve()
    manifest = _read_manifest(folder)
    check_listed(manifest)
    # All sizes before the first hash: what is cheap to find is found at once.
    for name, entry in manifest.files.items():
        _check_size(folder, name, entry)
    for name, entry in manifest.files.items():
        if check == "full" or (check == "quick" and entry.size < LARGE_FILE):
            _check_hash(folder, name, entry)
    return Bundle(folder, manifest, _extra_files(folder, manifest))


def check_listed(manifest: Manifest) -> None:
    """Refuses a manifest that does not list what a bundle needs: a tokenizer, and a graph or engines.

    Raises:
        BundleError: It lists no such file, or a path that leaves the bundle's folder.
    """
    engines = [engine.file for engine in manifest.engines]
    for name in (TOKENIZER_NAME, *(engines or [manifest.graph.file])):
        if name not in manifest.files:
            raise BundleError(f"{MANIFEST_NAME} lists no {name}, which a bundle needs.", _FETCH_AGAIN)
    for name in manifest.files:
        _check_name(name)
    for name in manifest.files:
        if any(str(folder) in manifest.files for folder in PurePosixPath(name).parents):
            raise BundleError(f"{MANIFEST_NAME} lists {name!r} inside what it lists as a file.", _UNSAFE)


def hash_file(path: Path) -> str:
    """The SHA-256 of a file in lower-case hexadecimal, read in blocks of 4 MiB."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        block = memoryview(bytearray(_BLOCK))
        while count := file.readinto(block):
            digest.update(block[:count])
    return digest.hexdigest()


def _read_manifest(folder: Path) -> Manifest:
    path = folder / MANIFEST_NAME
    try:
        found = path.lstat()
        if not stat.S_ISREG(found.st_mode):
            raise BundleError(f"{path} is a link or not a file.", _UNSAFE)
        if found.st_size > _MANIFEST_LIMIT:
            raise BundleError(f"{path} has {found.st_size} bytes; no manifest is that long.", _FETCH_AGAIN)
        return Manifest.from_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BundleError(
            f"{folder} is not a bundle: it has no {MANIFEST_NAME}.",
            "Give the folder that `gemma-export build` wrote; a build that was stopped leaves none.",
        ) from None
    except UnicodeDecodeError:
        raise BundleError(f"{path} is not JSON: it is not UTF-8.", _FETCH_AGAIN) from None
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error.strerror}.", "Check its permissions.") from error


def _check_name(name: str) -> None:
    """Refuses a path that leaves the folder."""
    parts = PurePosixPath(name).parts
    # "a//b", "./a" and "a/" are other spellings of a path that has one: equal to its parts or refused.
    # A backslash or a colon is harmless here and means a drive or a folder elsewhere.
    plain = "/".join(parts) == name and not set(name) & set("\\:\0") and _has_bytes(name)
    if not parts or not plain or ".." in parts or name.startswith("/") or name == MANIFEST_NAME:
        raise BundleError(f"{MANIFEST_NAME} lists {name!r}, which is no path inside the bundle.", _UNSAFE)


def _has_bytes(name: str) -> bool:
    """Whether a file system can spell a name; JSON can write halves of characters that are none."""
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        return False
    return True


def _check_size(folder: Path, name: str, entry: FileEntry) -> None:
    """Refuses a path that passes a link, or is not a file of the stated size."""
    path = folder
    try:
        for part in PurePosixPath(name).parts:
            path = path / part
            found = path.lstat()
            if stat.S_ISLNK(found.st_mode):
                raise BundleError(
                    f"{path} is a link; a bundle's files must be in its own folder.",
                    "Copy the bundle with the files themselves (cp -rL) if you trust where the links lead.",
                )
    except (FileNotFoundError, NotADirectoryError):
        raise BundleError(f"{name} is missing from the bundle {folder}.", _FETCH_AGAIN) from None
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error.strerror}.", "Check its permissions.") from error
    if not stat.S_ISREG(found.st_mode):
        raise BundleError(f"{path} is not a file.", _FETCH_AGAIN)
    if found.st_size != entry.size:
        raise BundleError(f"{name} has {found.st_size} bytes; the manifest says {entry.size}.", _FETCH_AGAIN)


def _check_hash(folder: Path, name: str, entry: FileEntry) -> None:
    try:
        found = hash_file(folder / name)
    except OSError as error:
        raise BundleError(f"{name} cannot be read: {error.strerror}.", "Check its permissions.") from error
    if found != entry.sha256.lower():
        raise BundleError(
            f"{name} has been changed: its SHA-256 is {found[:12]}…, the manifest says {entry.sha256[:12]}….",
            _FETCH_AGAIN,
        )


def _extra_files(folder: Path, manifest: Manifest) -> tuple[str, ...]:
    listed = {*manifest.files, MANIFEST_NAME}
    present = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())
    return tuple(sorted(name for name in present if name not in listed))
