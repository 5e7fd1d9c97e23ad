"""The file of codes that calibration chose one by one: safetensors, written tensor by tensor.

A safetensors file begins with a header that says where every tensor lies, and which tensors there will be is
only known at the end. So room is left for the largest header there can be, and what is left over is filled
with spaces, as the format allows.
Format: https://github.com/huggingface/safetensors#format.
"""

import json
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from gemma_export.disk import disk_errors
from gemma_export.exporter.checkpoints.tensor import bytes_of

_DTYPES = {torch.int8: "I8", torch.float32: "F32"}
_PREFIX_BYTES = 8
_ALIGNMENT = 8
"""The tensors begin at a multiple of this; int8 ones may leave those behind them at any address."""


class CodesFile:
    """Writes codes and scales of linear layers, a layer at a time.

    Nothing is left where the context ends with an error, or where no layer was added.

    The tensors are `{layer}.codes`, int8 [N, K], and `{layer}.scales`, fp32 [N, G].

    Args:
        path: Where the file goes when the context is left.
        layers: The layers that may be added.

    Raises:
        StorageError: The disk refuses, here or in any method.
    """

    def __init__(self, path: Path, layers: Sequence[str]) -> None:
        self._path = path
        self._draft = path.with_name(f".{path.name}.partial")
        largest = 2**62
        names = [f"{layer}.{part}" for layer in layers for part in ("codes", "scales")]
        room = len(_header(dict.fromkeys(names, ("F32", (largest, largest), (largest, largest)))))
        self._room = -(-(_PREFIX_BYTES + room) // _ALIGNMENT) * _ALIGNMENT - _PREFIX_BYTES
        self._entries: dict[str, tuple[str, tuple[int, ...], tuple[int, int]]] = {}
        self._written = 0
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._draft.open("wb")
            self._file.seek(_PREFIX_BYTES + self._room)

    def __enter__(self) -> "CodesFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with disk_errors(self._path):
            try:
                if kind is None and self._entries:
                    self._write_header()
                    self._file.close()
                    self._draft.replace(self._path)
            finally:
                self._file.close()
                self._draft.unlink(missing_ok=True)

    @property
    def layers(self) -> int:
        """How many layers were added."""
        return len(self._entries) // 2

    def add(self, layer: str, codes: Tensor, scales: Tensor) -> None:
        """Writes the tensors of one layer."""
        with disk_errors(self._path):
            for name, tensor in ((f"{layer}.codes", codes), (f"{layer}.scales", scales)):
                tensor = tensor.contiguous()
                stop = self._written + prod(tensor.shape) * tensor.dtype.itemsize
                self._file.write(bytes_of(tensor))
                self._entries[name] = (_DTYPES[tensor.dtype], tuple(tensor.shape), (self._written, stop))
                self._written = stop

    def _write_header(self) -> None:
        self._file.seek(0)
        self._file.write(self._room.to_bytes(_PREFIX_BYTES, "little"))
        self._file.write(_header(self._entries).ljust(self._room))


def _header(entries: Mapping[str, tuple[str, tuple[int, ...], tuple[int, int]]]) -> bytes:
    return json.dumps(
        {
            name: {"dtype": dtype, "shape": shape, "data_offsets": span}
            for name, (dtype, shape, span) in entries.items()
        }
    ).encode()
