"""The small bundle with engines for the fake TensorRT."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support.fake_tensorrt import write_engine
from support.small_bundle import Shape, manifest, write_bundle, write_manifest

from gemma_export.runtime.bundle import open_bundle
from gemma_export.runtime.onnxruntime import OnnxRuntimeBackend
from gemma_export.runtime.session import Session

VERSION = "1.7.1.116"

Profile = tuple[str, tuple[int, int, int], tuple[int, int, int]]
"""Name; least, best and most rows; least, best and most tokens."""

LAST = Shape(logits="last")

PREFILL: Profile = ("prefill", (1, 1, 1), (1, 4, 8))
DECODE: Profile = ("decode", (1, 1, 1), (1, 1, 1))


def decode_batch(least: int, most: int) -> Profile:
    return ("decode-batch", (least, most, most), (1, 1, 1))


@dataclass(frozen=True)
class FakeEngineFile:
    """An engine and what the manifest says of it."""

    profiles: Sequence[Profile] = (PREFILL, DECODE)
    sms: tuple[int, ...] = (89,)
    version: str = VERSION
    flavour: str = "rtx"
    name: str = "model"


def write_engine_bundle(folder: Path, shape: Shape = LAST, *engines: FakeEngineFile) -> Path:
    """Writes the small bundle with engines of its graph."""
    write_bundle(folder, shape)
    for engine in engines or (FakeEngineFile(),):
        write_engine(
            folder / "engines" / f"{engine.name}.engine",
            folder / "model.onnx",
            [_shapes(profile, shape) for profile in engine.profiles],
            engine.version,
            engine.sms,
        )
    write_manifest(folder, engine_manifest(shape, *engines))
    return folder


def engine_manifest(shape: Shape, *engines: FakeEngineFile) -> dict[str, Any]:
    """The manifest without its files."""
    engines = engines or (FakeEngineFile(),)
    return {
        **manifest(shape),
        "target": engines[0].flavour,
        "engines": [
            {
                "file": f"engines/{engine.name}.engine",
                "flavour": engine.flavour,
                "version": engine.version,
                "sms": list(engine.sms),
                "profiles": [
                    {
                        "name": name,
                        "batch": dict(zip(("min", "opt", "max"), batch, strict=True)),
                        "tokens": dict(zip(("min", "opt", "max"), tokens, strict=True)),
                        "activation_bytes": 4096,
                    }
                    for name, batch, tokens in engine.profiles
                ],
                "weight_bytes": 1 << 20,
                "kernels": {},
            }
            for engine in engines
        ],
    }


def _shapes(profile: Profile, shape: Shape) -> dict[str, list[list[int]]]:
    _, batch, tokens = profile
    ids = [[rows, count] for rows, count in zip(batch, tokens, strict=True)]
    caches = {
        f"past_key_values.{layer}.{part}": [[rows, shape.kv_heads, slots, shape.head_dim] for rows in batch]
        for layer, slots in enumerate(shape.layer_slots)
        for part in ("key", "value")
    }
    return {"input_ids": ids, "position_ids": ids, **caches}


def on_cpu(bundle: Path) -> Session:
    """The same graph through the onnxruntime backend."""
    opened = open_bundle(bundle, check="sizes")
    return Session(opened, OnnxRuntimeBackend(opened, threads=1))
