"""A prompt cache as a file: for the next prompt that starts the same, in another process.

The file is a zip of arrays, as numpy writes it, whose checksums find damage. Its header says what made it; it
fits the bundle that did and no other, because keys and values mean something to their own weights only. Of
the caches it has the slots that were written, in the format they have in memory.
"""

import hashlib
import json
import os
import struct
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gemma_export.disk import disk_errors
from gemma_export.errors import SavedCacheError, UsageError
from gemma_export.runtime.kv_cache import KVCache
from gemma_export.runtime.manifest import TOKENIZER_NAME, Manifest
from gemma_export.runtime.prompt_cache import PromptCache
from gemma_export.schema import MisshapenError, read_value

FORMAT = "gemma-export-cache"
FORMAT_VERSION = 1

# What numpy and zipfile raise where the bytes of a file are not what they should be.
_DAMAGE = (
    OSError,
    ValueError,
    KeyError,
    EOFError,
    MemoryError,
    NotImplementedError,
    RuntimeError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
)
_AGAIN = "Leave --load-cache out, and write it again with --save-cache."


@dataclass(frozen=True)
class _Header:
    """What a file says of itself.

    Attributes:
        bundle: What made it, for people.
        digest: Of the files that made it.
        dtype: Of the caches' elements.
        length: Slots that are filled.
        written: Positions that have been written: more than `length` where the row has gone back.
    """

    bundle: str
    digest: str
    dtype: str
    length: int
    written: int
    format: str = FORMAT
    format_version: int = FORMAT_VERSION


def save_cache(prompt_cache: PromptCache, manifest: Manifest, path: str | os.PathLike[str]) -> None:
    """Writes a prompt cache, whole or not at all; an older file is replaced.

    Args:
        prompt_cache: Its cache lies in the host's memory.
        manifest: Of the bundle that filled it.
        path: The file.

    Raises:
        UsageError: There is nothing in it, or it lies on a device.
        StorageError: The disk refuses; nothing is left, and an older file is as it was.
    """
    cache = prompt_cache.cache
    _check_host(cache)
    if not cache.length:
        raise UsageError("There is no cache to save: nothing has been read.", "Save it after a prompt.")
    header = _Header(_described(manifest), _digest(manifest), cache.dtype, cache.length, cache.written)
    arrays = {
        "header": np.frombuffer(json.dumps(asdict(header)).encode(), np.uint8),
        "tokens": np.array(prompt_cache.tokens, np.int64),
        **{name: buffer[0, :, :slots] for name, buffer, slots in _parts(cache, cache.written)},
    }
    final = Path(path)
    draft = final.with_name(f".{final.name}.partial")
    with disk_errors(final):
        try:
            with draft.open("wb") as file:
                np.savez(file, allow_pickle=False, **arrays)
            draft.replace(final)
        finally:
            draft.unlink(missing_ok=True)


def load_cache(path: str | os.PathLike[str], manifest: Manifest, cache: KVCache) -> PromptCache:
    """Reads what `save_cache` wrote into an empty cache.

    Args:
        path: The file.
        manifest: Of the bundle that will go on with it.
        cache: Of one row, empty; it is not to be used where this fails.

    Raises:
        UsageError: There is no such file, or the cache lies on a device.
        SavedCacheError: It is damaged, none of a saved cache, of a newer format, or of another bundle.
    """
    _check_host(cache)
    try:
        with open(path, "rb") as stream:
            if not zipfile.is_zipfile(stream):
                raise _refusal(path, "it is no archive of arrays")
            file = np.load(stream, allow_pickle=False)
            header = _read_header(file, path, manifest)
            tokens = file["tokens"]
            wrong = tokens.dtype != np.int64 or tokens.ndim != 1 or not 0 < header.length <= len(tokens)
            outside = wrong or ((tokens < 0) | (tokens >= manifest.model.vocab_size)).any()
            if outside or not header.length <= header.written or len(tokens) > cache.max_length + 1:
                raise _refusal(path, "its tokens are none of this bundle's")
            for name, buffer, slots in _parts(cache, header.written):
                part = file[name]
                shape = (buffer.shape[1], slots, buffer.shape[3])
                if part.dtype != buffer.dtype or part.shape != shape:
                    raise _refusal(path, f"{name} is {part.dtype} {list(part.shape)}")
                buffer[0, :, :slots] = part
    except FileNotFoundError:
        raise UsageError(f"{path} is not there.", "Write it with --save-cache first.") from None
    except _DAMAGE as error:
        raise _refusal(path, str(error).strip("'\"") or type(error).__name__) from error
    cache.restore(header.length, header.written)
    return PromptCache(cache, tokens.tolist())


def _parts(cache: KVCache, written: int) -> Iterator[tuple[str, Any, int]]:
    """The caches by name, and how many slots of each have been written."""
    for kind, buffers in (("key", cache.key_buffers), ("value", cache.value_buffers)):
        for layer, buffer in enumerate(buffers):
            yield f"{layer}.{kind}", buffer, min(written, buffer.shape[2])


def _read_header(file: Any, path: str | os.PathLike[str], manifest: Manifest) -> _Header:
    try:
        data = json.loads(bytes(file["header"]))
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise _refusal(path, "it is something else")
        if data.get("format_version") != FORMAT_VERSION:
            raise _refusal(path, f"its format version is {data.get('format_version')}, not {FORMAT_VERSION}")
        header: _Header = read_value(data, _Header)
    except (ValueError, RecursionError, MisshapenError) as error:
        raise _refusal(path, f"its header is not understood: {error}") from error
    if header.digest != _digest(manifest) or header.dtype != manifest.cache_dtype:
        raise SavedCacheError(
            f"{path} was saved by another bundle, {header.bundle}; this one is {_described(manifest)}.",
            _AGAIN,
        )
    return header


def _digest(manifest: Manifest) -> str:
    """Of what a cache depends on: graph, weights and tokenizer."""
    names = sorted(
        name for name in manifest.files if name.startswith(manifest.graph.file) or name == TOKENIZER_NAME
    )
    return hashlib.sha256("".join(f"{manifest.files[name].sha256}\n" for name in names).encode()).hexdigest()


def _described(manifest: Manifest) -> str:
    name = f"{manifest.model.name} in {manifest.precision} for {manifest.target}"
    return f"{name} with {manifest.graph.max_length} slots of {manifest.cache_dtype}"


def _check_host(cache: KVCache) -> None:
    if not all(isinstance(buffer, np.ndarray) for buffer in (*cache.key_buffers, *cache.value_buffers)):
        raise UsageError(
            "A cache on a device cannot be saved or loaded.", "Use a bundle built for --target cpu."
        )


def _refusal(path: str | os.PathLike[str], why: str) -> SavedCacheError:
    return SavedCacheError(f"{path} is no saved cache, or is damaged: {why}.", _AGAIN)
