"""Kernels of our own for onnxruntime on a CPU: products with quantized weights, and attention.

They are compiled where there is a C compiler when the package is installed, and take the place of
onnxruntime's MatMulNBits and GroupQueryAttention in a session that their library is registered with.
Without them the same graph runs on onnxruntime's own, whose products copy every weight when they load it.

The environment's GEMMA_EXPORT_KERNELS names what runs: `avx512-vnni`, `avx2` (products only), `portable`, or
`built-in` for onnxruntime's own; unset, it is the fastest that the processor has.
"""

import ctypes
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

ATTENTION = "gemma_export.attention"
"""An entry of a session's configuration, before the library is registered with it: attention, too, is ours.
Its kernels know a cache of fp32 numbers only."""


def library() -> Path | None:
    """The library to register with a session; None where onnxruntime's own kernels are to run."""
    found = _compiled()
    return found if found is not None and _kernels_of(found) is not None else None


def kernels() -> str | None:
    """The instructions that the kernels of `library` use, by name; None where there is none."""
    found = _compiled()
    return None if found is None else _kernels_of(found)


def _compiled() -> Path | None:
    paths = (Path(__file__).with_name(f"_kernels{suffix}") for suffix in EXTENSION_SUFFIXES)
    return next((path for path in paths if path.is_file()), None)


def _kernels_of(path: Path) -> str | None:
    try:
        name = ctypes.CDLL(str(path)).gemma_export_kernels
    except (OSError, AttributeError):  # Made for another machine, or not this library.
        return None
    name.restype = ctypes.c_char_p
    found: bytes | None = name()
    return None if found is None else found.decode()
