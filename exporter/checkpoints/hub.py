"""Finds a released Gemma in the local Hugging Face cache; nothing is downloaded.

Layout: `hub/models--OWNER--NAME/{refs/main, snapshots/REVISION/…}`, where `refs/main` holds a revision and a
snapshot's files are links into `blobs/`. Where `hub` is follows huggingface_hub's environment variables.
"""

import os
from pathlib import Path

from gemma_export.errors import CheckpointError
from gemma_export.exporter.checkpoints.safetensors import INDEX_FILE, SINGLE_FILE
from gemma_export.exporter.config import hub_repositories


def hub_cache() -> Path:
    """The folder the Hugging Face cache is in: HF_HUB_CACHE, HF_HOME/hub, or below XDG_CACHE_HOME."""
    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if value := os.environ.get(variable):
            return _expanded(value)
    if value := os.environ.get("HF_HOME"):
        return _expanded(value) / "hub"
    return _expanded(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface" / "hub"


def snapshot_of(repository: Path) -> Path | None:
    """The snapshot that `refs/main` names, or the only one there is.

    Args:
        repository: A repository's folder in the cache, `models--OWNER--NAME`.
    """
    snapshots = repository / "snapshots"
    try:
        revision = (repository / "refs" / "main").read_text().strip()
    except (OSError, UnicodeDecodeError):
        revision = ""
    if revision and (snapshots / revision).is_dir():
        return snapshots / revision
    folders = [folder for folder in snapshots.glob("*") if folder.is_dir()]
    return folders[0] if len(folders) == 1 else None


def find_in_hub_cache(size: str) -> Path:
    """The snapshot folder of the first repository of a size that is in the cache with its weights.

    Raises:
        CheckpointError: None is; the hint says how to get one.
    """
    cache, repositories = hub_cache(), hub_repositories(size)
    incomplete = ""
    for repository in repositories:
        snapshot = snapshot_of(cache / f"models--{repository.replace('/', '--')}")
        if snapshot is None:
            continue
        if any(os.path.lexists(snapshot / name) for name in (SINGLE_FILE, INDEX_FILE)):
            return snapshot
        incomplete = incomplete or f" {repository} is there, but without safetensors weights."
    example = repositories[0] if repositories else "google/gemma-2b"
    raise CheckpointError(
        f"No Gemma of size {size} is in the Hugging Face cache {cache}.{incomplete}",
        f"Accept the licence on https://huggingface.co/{example} and run `hf download {example}`; "
        "or give --checkpoint PATH, or --random-weights.",
    )


def _expanded(value: str) -> Path:
    return Path(os.path.expandvars(value)).expanduser()
