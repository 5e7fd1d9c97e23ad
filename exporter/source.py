"""From what a person typed to the model it names: the checkpoint, its shape, its weights, its tokenizer."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from gemma_export.errors import CheckpointError
from gemma_export.exporter.checkpoints.checkpoint import (
    Checkpoint,
    LazyTensor,
    RandomCheckpoint,
    find_in_hub_cache,
    open_checkpoint,
)
from gemma_export.exporter.checkpoints.weights import canonical_weights, config_for
from gemma_export.exporter.config import SHIPPED, GemmaConfig, preset, size_of, tiny_folder
from gemma_export.exporter.request import BuildRequest
from gemma_export.exporter.tokenizer.random import write_random_tokenizer


@dataclass(frozen=True)
class Source:
    """A model to export; nothing of its weights has been read.

    Attributes:
        checkpoint: The tensors as they are named there.
        config: The shape.
        weights: The tensors by canonical name, all of them and nothing else.
        tokenizer: The SentencePiece model; None for random weights, which get one made to measure.
    """

    checkpoint: Checkpoint
    config: GemmaConfig
    weights: Mapping[str, LazyTensor]
    tokenizer: Path | None

    @property
    def size(self) -> str:
        """One of `SIZES`, or `custom`."""
        return size_of(self.config) or "custom"

    def write_tokenizer_model(self, folder: Path) -> Path:
        """The tokenizer's file: the source's own, or one written into `folder`."""
        if self.tokenizer is not None:
            return self.tokenizer
        path = folder / "tokenizer.model"
        write_random_tokenizer(path, self.config.vocab_size)
        return path


def open_source(
    checkpoint: Path | None = None, size: str | None = None, tokenizer: Path | None = None
) -> Source:
    """Opens a checkpoint by its path, or by a size: what ships, or the local Hugging Face cache.

    Raises:
        CheckpointError: It is not there, damaged, not a Gemma, or has no tokenizer.
    """
    path = checkpoint if checkpoint is not None else _find(size)
    found = open_checkpoint(path, size)
    tokenizer = tokenizer or found.tokenizer_path
    if tokenizer is None:
        raise CheckpointError(
            f"There is no tokenizer.model beside {found.source}.",
            "Put the one that came with the weights there, or name it with --tokenizer PATH.",
        )
    config = config_for(found, size)
    return Source(found, config, canonical_weights(found, config), tokenizer)


def random_source(size: str, seed: int, dtype: torch.dtype, tokenizer: Path | None = None) -> Source:
    """A size with random weights."""
    config = preset(size)
    checkpoint = RandomCheckpoint(config, seed, dtype)
    return Source(checkpoint, config, canonical_weights(checkpoint, config), tokenizer)


def requested_source(request: BuildRequest) -> Source:
    """The source of a build."""
    if request.random_weights:
        assert request.size is not None
        storage = request.scheme.storage
        dtype = torch.bfloat16 if storage in ("int8", "int4") else getattr(torch, storage)
        return random_source(request.size, request.seed or 0, dtype, request.tokenizer)
    return open_source(request.checkpoint, request.size, request.tokenizer)


def _find(size: str | None) -> Path:
    assert size is not None
    return tiny_folder(size) if size in SHIPPED else find_in_hub_cache(size)
