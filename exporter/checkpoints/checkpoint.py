"""Opens a checkpoint in whatever form it comes: tensors by name, none of them read yet.

Forms: a folder or a snapshot of safetensors (single or sharded), a single safetensors file, Google's PyTorch
`.ckpt`, and random weights. What it is not is said by name.
"""

import hashlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from gemma_export.errors import CheckpointError
from gemma_export.exporter.checkpoints.google import read_google
from gemma_export.exporter.checkpoints.hub import find_in_hub_cache, snapshot_of
from gemma_export.exporter.checkpoints.random import random_tensors
from gemma_export.exporter.checkpoints.safetensors import (
    INDEX_FILE,
    SINGLE_FILE,
    read_safetensors,
    read_sharded,
    shard_count,
)
from gemma_export.exporter.checkpoints.tensor import DOWNLOAD_AGAIN, LazyTensor, RowSlice, bytes_of, rows_of
from gemma_export.exporter.config import CONFIG_FILE, GemmaConfig, config_from_json, require_size
from gemma_export.exporter.config_json import read_json

__all__ = [
    "Checkpoint",
    "LazyTensor",
    "RandomCheckpoint",
    "RowSlice",
    "find_in_hub_cache",
    "open_checkpoint",
]

TOKENIZER_FILE = "tokenizer.model"

_SAMPLE_BYTES = 64 * 1024
_GIVE_A_GEMMA = "Give a folder of safetensors, a .safetensors file, or one of Google's .ckpt files."
_CONVERT = (
    "Convert it: transformers.AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER) "
    "writes safetensors."
)
_TAKE_ORIGINAL = "Give the safetensors it was made from, such as those of `hf download google/gemma-2b`."
# Ending → what it is, and what to do.
_OTHER_FORMS = {
    ".gguf": ("a llama.cpp file", _TAKE_ORIGINAL),
    ".bin": ("an old Hugging Face checkpoint, a pickle", _CONVERT),
    ".pt": ("a PyTorch pickle", _CONVERT),
    ".pth": ("a PyTorch pickle", _CONVERT),
    ".h5": ("a Keras checkpoint", _TAKE_ORIGINAL),
    ".keras": ("a Keras checkpoint", _TAKE_ORIGINAL),
    ".msgpack": ("a Flax checkpoint", _TAKE_ORIGINAL),
    ".npz": ("a NumPy archive", _TAKE_ORIGINAL),
    ".tflite": ("a LiteRT model", _TAKE_ORIGINAL),
    ".task": ("a LiteRT model", _TAKE_ORIGINAL),
    ".onnx": ("an ONNX graph", _TAKE_ORIGINAL),
    "_METADATA": ("a JAX checkpoint", _TAKE_ORIGINAL),
    "manifest.ocdbt": ("a JAX checkpoint", _TAKE_ORIGINAL),
}


class Checkpoint(Mapping[str, LazyTensor]):
    """The tensors of a checkpoint by the names it gives them, and what lies beside them.

    Args:
        tensors: The tensors.
        form: `safetensors`, `sharded safetensors`, `google ckpt` or `random`.
        source: Where it came from, for people.
        config: What its `config.json` says; None where there is none.
        folder: The folder it is in; None where there is none.
        tokenizer_path: The `tokenizer.model` beside it; None where there is none.
    """

    def __init__(
        self,
        tensors: Mapping[str, LazyTensor],
        form: str,
        source: str,
        config: GemmaConfig | None = None,
        folder: Path | None = None,
        tokenizer_path: Path | None = None,
    ) -> None:
        self._tensors = tensors
        self.form = form
        self.source = source
        self.config = config
        self.folder = folder
        self.tokenizer_path = tokenizer_path

    def __getitem__(self, name: str) -> LazyTensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def digest(self) -> str:
        """A SHA-256 that tells one checkpoint's weights from another's, in hexadecimal.

        It covers the name, dtype and shape of every tensor, sorted by name, and about 64 KiB of each
        tensor's rows from its beginning, middle and end: a small tensor whole, a large one sampled, so
        that 17 GB cost a few dozen megabytes. Any training changes it; an edit of a few rows may not.
        It does not depend on the file: single and sharded safetensors of the same weights agree.
        """
        digest = hashlib.sha256()
        for name in sorted(self):
            tensor = self[name]
            digest.update(f"{name} {tensor.dtype} {tensor.shape}\n".encode())
            for start, stop in _samples(tensor):
                digest.update(bytes_of(tensor.read(start, stop)))
        return digest.hexdigest()


class RandomCheckpoint(Checkpoint):
    """A checkpoint of random weights: no file, and any size for nothing.

    Args:
        config: The model.
        seed: The same seed gives the same weights, on any machine.
        dtype: float32, float16 or bfloat16.
    """

    def __init__(self, config: GemmaConfig, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> None:
        source = f"random weights, seed {seed}"
        super().__init__(random_tensors(config, seed, dtype), "random", source, config)
        self._key = f"{source}, {dtype}, {config}"

    def digest(self) -> str:
        """A SHA-256 of what the weights are made from: the seed, the dtype and the configuration."""
        return hashlib.sha256(self._key.encode()).hexdigest()


def open_checkpoint(path: str | Path, size: str | None = None) -> Checkpoint:
    """Opens a checkpoint; reads `config.json` and headers, and no weights.

    Args:
        path: A folder with `model.safetensors`, with `model.safetensors.index.json` or with one `.ckpt` file;
            a repository's folder in the Hugging Face cache; or a `.safetensors` or `.ckpt` file. A
            `config.json` and a `tokenizer.model` are looked for beside the weights.
        size: The size that it must have, `tiny`, `2b` or `7b`; None takes any.

    Raises:
        CheckpointError: It is missing, damaged, of a form or family that cannot be read, or of another size.
    """
    path = Path(path).expanduser()
    if not path.exists():
        if path.is_symlink():
            raise CheckpointError(f"{path} is a link to a file that is not there.", DOWNLOAD_AGAIN)
        raise CheckpointError(f"There is no checkpoint {path}.", "Check the path given to --checkpoint.")
    if (path / "snapshots").is_dir():
        path = snapshot_of(path) or path
    folder = path if path.is_dir() else path.parent
    weights = _weights_in(path) if path.is_dir() else path
    config = _config_beside(weights)
    if config is not None and size is not None:
        require_size(config, size)
    form, tensors = _read(weights)
    tokenizer = folder / TOKENIZER_FILE
    return Checkpoint(
        tensors, form, str(path), config, folder, tokenizer_path=tokenizer if tokenizer.is_file() else None
    )


def _weights_in(folder: Path) -> Path:
    """The file that stands for a folder's weights.

    Raises:
        CheckpointError: There is none, or more than one.
    """
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise CheckpointError(
            f"{folder} cannot be opened: {error.strerror or error}.", "Check its permissions."
        ) from error
    for name in (SINGLE_FILE, INDEX_FILE):
        if name in names:
            return folder / name
    ckpt = [name for name in names if name.endswith(".ckpt")]
    if len(ckpt) == 1:
        return folder / ckpt[0]
    if ckpt:
        raise CheckpointError(
            f"{folder} holds {len(ckpt)} .ckpt files: {', '.join(ckpt[:5])}.",
            "Give one of them as --checkpoint.",
        )
    if any(shard_count(Path(name)) for name in names):
        raise CheckpointError(f"{folder} holds shards, but no {INDEX_FILE}.", DOWNLOAD_AGAIN)
    safetensors = [name for name in names if name.endswith(".safetensors")]
    if safetensors:
        raise CheckpointError(
            f"{folder} holds no {SINGLE_FILE}, but {', '.join(safetensors[:5])}.",
            "Give the file as --checkpoint.",
        )
    for name in names:
        _refuse_other_form(folder / name)
    raise CheckpointError(f"{folder} holds no checkpoint.", _GIVE_A_GEMMA)


def _read(path: Path) -> tuple[str, Mapping[str, LazyTensor]]:
    if path.name.endswith(".safetensors.index.json"):
        return "sharded safetensors", read_sharded(path)
    if path.suffix == ".safetensors":
        shards = shard_count(path)
        if shards is not None and shards > 1:
            raise CheckpointError(f"{path} is one of {shards} shards.", f"Give its folder, {path.parent}.")
        return "safetensors", read_safetensors(path)
    if path.suffix == ".ckpt":
        return "google ckpt", read_google(path)
    _refuse_other_form(path)
    raise CheckpointError(f"{path} is not a checkpoint of any form that can be read.", _GIVE_A_GEMMA)


def _refuse_other_form(path: Path) -> None:
    form = _OTHER_FORMS.get(path.suffix) or _OTHER_FORMS.get(path.name)
    if form is not None:
        raise CheckpointError(f"{path} is {form[0]}, which cannot be read.", form[1])


def _config_beside(weights: Path) -> GemmaConfig | None:
    """What the `config.json` beside the weights says; Google's folders have one of another kind, or none."""
    path = weights.parent / CONFIG_FILE
    if not os.path.lexists(path):
        return None
    if weights.suffix == ".ckpt" and "model_type" not in read_json(path):
        return None
    return config_from_json(path)


def _samples(tensor: LazyTensor) -> list[tuple[int, int]]:
    """Rows at a tensor's beginning, middle and end, about `_SAMPLE_BYTES` each, disjoint."""
    rows = rows_of(tensor)
    row_bytes = max(1, tensor.dtype.itemsize * torch.Size(tensor.shape[1:]).numel())
    count = max(1, _SAMPLE_BYTES // row_bytes)
    if rows <= 3 * count:
        return [(0, rows)]
    middle = (rows - count) // 2
    return [(0, count), (middle, middle + count), (rows - count, rows)]
