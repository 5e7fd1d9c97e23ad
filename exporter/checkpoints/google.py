"""Reads Google's PyTorch checkpoint: a `.ckpt` file, a zip of one pickle and the bytes of each tensor.

The pickle is loaded by torch with `weights_only`, so that nothing in it runs, and as fake tensors, so that
no weight is read: a fake tensor remembers where its bytes begin. That is checked against the zip's own
directory, then the bytes are read in place.
Form: https://github.com/google/gemma_pytorch, `GemmaForCausalLM.load_weights`.
"""

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from gemma_export.errors import CheckpointError
from gemma_export.exporter.checkpoints.tensor import DOWNLOAD_AGAIN, FileTensor, open_file, stamp_of

STATE_DICT = "model_state_dict"

_SAVE_AGAIN = (
    "Save it again with torch: torch.save(torch.load(old, weights_only=True, map_location='cpu'), new)."
)


def read_google(path: Path) -> dict[str, FileTensor]:
    """The tensors of a `.ckpt` file, in its order.

    Raises:
        CheckpointError: It is missing, damaged, of a form whose bytes have no place of their own in the file,
            or holds more than tensors.
    """
    with open_file(path) as file:
        stamp = stamp_of(file)
        magic = file.read(4)
    places = _places(path, magic)
    state = _state_dict(path)
    tensors: dict[str, FileTensor] = {}
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise CheckpointError(
                f"{path} is no Gemma checkpoint: {name!r} in its {STATE_DICT} is not a tensor.",
                "Give one of Google's .ckpt files, or a folder of safetensors.",
            )
        storage = value.untyped_storage()
        record = getattr(storage, "_checkpoint_offset", None)
        skipped = int(value.storage_offset()) * value.dtype.itemsize
        if record not in places or not value.is_contiguous():
            raise CheckpointError(f"{name} in {path} cannot be read in place.", _SAVE_AGAIN)
        tensor = FileTensor(name, tuple(value.shape), value.dtype, path, record + skipped, stamp)
        if skipped + tensor.nbytes > places[record]:
            raise CheckpointError(
                f"{path} is damaged: {name} is larger than its bytes.", "Download the checkpoint again."
            )
        tensors[name] = tensor
    return tensors


def _state_dict(path: Path) -> dict[Any, Any]:
    """What `model_state_dict` holds, with fake tensors for tensors.

    Raises:
        CheckpointError: The pickle is damaged, wants to run code, or is of another form.
    """
    try:
        with FakeTensorMode():
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} holds more than weights, or is damaged: it cannot be loaded without running code in it.",
            "Take the checkpoint from its publisher, or convert it to safetensors where you trust it.",
        ) from error
    except Exception as error:  # a damaged pickle can raise anything
        raise CheckpointError(
            f"{path} is damaged: {type(error).__name__} while reading it.", "Download the checkpoint again."
        ) from error
    state = content.get(STATE_DICT) if isinstance(content, dict) else None
    if not isinstance(state, dict):
        raise CheckpointError(
            f"{path} is no Gemma checkpoint: it is not a dict with {STATE_DICT!r}.",
            "Give one of Google's .ckpt files, or a folder of safetensors.",
        )
    return state


def _places(path: Path, magic: bytes) -> dict[int, int]:
    """Where the bytes of every record of the zip begin, and how many they are.

    Raises:
        CheckpointError: It is not a zip, or a damaged one.
    """
    if magic[:2] == b"\x80\x02":
        raise CheckpointError(
            f"{path} is in the format of PyTorch before 1.6, whose tensors cannot be read in place.",
            _SAVE_AGAIN,
        )
    places: dict[int, int] = {}
    try:
        with zipfile.ZipFile(path) as archive, open_file(path) as file:
            for record in archive.infolist():
                if record.compress_type != zipfile.ZIP_STORED:
                    raise CheckpointError(
                        f"{path} is compressed, so its tensors cannot be read in place.", _SAVE_AGAIN
                    )
                # The local header's padding is its own: the directory does not give it.
                file.seek(record.header_offset + 26)
                lengths = file.read(4)
                name, extra = int.from_bytes(lengths[:2], "little"), int.from_bytes(lengths[2:], "little")
                places[record.header_offset + 30 + name + extra] = record.file_size
            order = next((r for r in archive.infolist() if r.filename.endswith("/byteorder")), None)
            if order and archive.read(order) != b"little":
                raise CheckpointError(f"{path} was written on a big-endian machine.", _SAVE_AGAIN)
    except CheckpointError:
        raise
    except Exception as error:  # a damaged zip can raise anything, too
        if magic == b"PK\x03\x04":
            raise CheckpointError(f"{path} is damaged or cut short.", DOWNLOAD_AGAIN) from error
        raise CheckpointError(
            f"{path} is not a PyTorch checkpoint.",
            "Give one of Google's .ckpt files, or a folder of safetensors.",
        ) from error
    return places
