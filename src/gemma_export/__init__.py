"""Export Gemma checkpoints to bundles that have proved themselves, and run them.

>>> import gemma_export
>>> session = gemma_export.load("bundle")        # imports no torch
>>> str(session.generate("Once", max_new_tokens=32))

The names below are loaded on first use, so that running a bundle never imports what only building needs.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from gemma_export.errors import GemmaExportError
from gemma_export.version import __version__

if TYPE_CHECKING:
    from gemma_export.exporter.pipeline import build
    from gemma_export.exporter.request import BuildRequest
    from gemma_export.runtime.session import Session, load

__all__ = ["BuildRequest", "GemmaExportError", "Session", "__version__", "build", "load"]

_HOME = {
    "BuildRequest": "gemma_export.exporter.request",
    "Session": "gemma_export.runtime.session",
    "build": "gemma_export.exporter.pipeline",
    "load": "gemma_export.runtime.session",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'gemma_export' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
