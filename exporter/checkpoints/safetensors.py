"""Reads safetensors files, single and sharded: headers only; the tensors stay in the files.

A file is the length of its header (8 bytes, little-endian), the header (JSON: tensor → dtype, shape, and
where its bytes begin and end behind the header), then the bytes, with no gap between tensors.
Format: https://github.com/huggingface/safetensors#format.
"""

import json
import re
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any, TypeGuard

import torch

from gemma_export.errors import CheckpointError
from gemma_export.exporter.checkpoints.tensor import (
    DOWNLOAD_AGAIN,
    FileTensor,
    open_file,
    read_exactly,
    stamp_of,
)
from gemma_export.exporter.config_json import read_json

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_HEADER_LIMIT = 100_000_000  # the format's own
_SHARD = re.compile(r"-\d+-of-(\d+)\.safetensors$")


def shard_count(path: Path) -> int | None:
    """How many files a checkpoint has, when the name says that this is one of them."""
    match = _SHARD.search(path.name)
    return int(match[1]) if match else None


def read_safetensors(path: Path) -> dict[str, FileTensor]:
    """The tensors of one safetensors file, in its order; only the header is read.

    Raises:
        CheckpointError: The file is missing, cut short, or not safetensors.
    """
    with open_file(path) as file:
        stamp = stamp_of(file)
        prefix = bytearray(8)
        read_exactly(file, memoryview(prefix), path)
        length = int.from_bytes(prefix, "little")
        if length > _HEADER_LIMIT:
            raise _damaged(path, f"its header would take {length} bytes")
        header = bytearray(min(length, max(stamp.size - 8, 0)))
        read_exactly(file, memoryview(header), path)
    if len(header) < length:
        raise CheckpointError(f"{path} is cut short: its header alone takes {length} bytes.", DOWNLOAD_AGAIN)
    begin = 8 + length
    tensors: dict[str, FileTensor] = {}
    end = 0
    for name, entry, span in _entries(path, header):
        dtype, shape = _DTYPES.get(entry["dtype"]), tuple(entry["shape"])
        if dtype is None:
            raise CheckpointError(
                f"{name} in {path} has the dtype {entry['dtype']}; only fp32, fp16 and bf16 can be read.",
                "Give the original weights instead of quantized ones.",
            )
        tensor = FileTensor(name, shape, dtype, path, begin + span[0], stamp)
        if span[0] != end or span[1] - span[0] != tensor.nbytes:
            raise _damaged(path, f"the place it gives for {name} cannot be right")
        tensors[name], end = tensor, span[1]
    if begin + end > stamp.size:
        raise CheckpointError(
            f"{path} is cut short: it has {stamp.size} bytes of the {begin + end} its header speaks of.",
            DOWNLOAD_AGAIN,
        )
    if begin + end < stamp.size:
        raise _damaged(path, f"{stamp.size - begin - end} bytes at its end belong to no tensor")
    return tensors


def _entries(path: Path, header: bytearray) -> list[tuple[str, dict[str, Any], tuple[int, int]]]:
    """Name, entry and place of every tensor, in the order of the places."""
    try:
        values = json.loads(header)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, "its header is not JSON") from error
    if not isinstance(values, dict):
        raise _damaged(path, "its header is not a JSON object")
    entries = []
    for name, entry in values.items():
        if name == "__metadata__":
            continue
        if not (
            isinstance(entry, dict)
            and isinstance(entry.get("dtype"), str)
            and _are_sizes(entry.get("shape"))
            and _are_sizes(span := entry.get("data_offsets"))
            and len(span) == 2
            and prod(entry["shape"]) < 2**60
        ):
            raise _damaged(path, f"its header does not describe {name} as it should")
        entries.append((name, entry, (span[0], span[1])))
    return sorted(entries, key=lambda entry: entry[2])


def _are_sizes(values: object) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def read_sharded(index: Path) -> dict[str, FileTensor]:
    """The tensors of a sharded checkpoint: the index, and the header of every shard it names.

    Raises:
        CheckpointError: A shard is missing or damaged, or the index and the shards contradict each other.
    """
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, Mapping) or not weight_map:
        raise _damaged(index, "it has no weight_map")
    for name, shard in weight_map.items():
        # A name with a folder in it would read files that are not part of the checkpoint.
        if not isinstance(shard, str) or Path(shard).name != shard or Path(shard).suffix != ".safetensors":
            raise _damaged(index, f"it puts {name} in {shard!r}, which is no file beside it")
    tensors: dict[str, FileTensor] = {}
    for shard in sorted(set(weight_map.values())):
        path = index.parent / shard
        if not path.exists() and not path.is_symlink():
            raise CheckpointError(f"The shard {shard} is missing from {index.parent}.", DOWNLOAD_AGAIN)
        for name, tensor in read_safetensors(path).items():
            if weight_map.get(name) != shard:
                raise _damaged(index, f"it does not say that {shard} holds {name}")
            tensors[name] = tensor
    absent = next((name for name in weight_map if name not in tensors), None)
    if absent is not None:
        raise _damaged(index, f"it says that {weight_map[absent]} holds {absent}, which it does not")
    return tensors


def _damaged(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(f"{path} is damaged: {reason}.", "Download the checkpoint again.")
