"""Ways to damage checkpoints and bundles."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Damage = Callable[[Path], object]
"""Called with a folder."""


def change_weights(checkpoint: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Changes the tensors of a folder's `model.safetensors`."""
    path = checkpoint / "model.safetensors"
    state = load_file(path)
    change(state)
    save_file(state, path, metadata={"format": "pt"})


def change_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes the values of a JSON file."""
    values = json.loads(path.read_text(encoding="utf-8"))
    change(values)
    path.write_text(json.dumps(values), encoding="utf-8")


def flip_byte(path: Path, offset: int) -> None:
    """Changes one byte of a file and not its size."""
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 0x40]))


def cut(path: Path, missing: int) -> None:
    """Takes bytes off a file's end."""
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - missing)


def remove(name: str) -> Damage:
    """Takes a file away."""
    return lambda folder: (folder / name).unlink()
