"""Plants outlier channels in a checkpoint, without changing what it says.

A few channels of what the layer norms make are far larger than the rest in every large model; that is what
makes activations hard to round to 8 bits. A small model has none, so they are put there.
"""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from gemma_export.exporter.checkpoints.tensor import rows_of
from gemma_export.exporter.config import GemmaConfig
from gemma_export.exporter.source import open_source


def readers(config: GemmaConfig) -> dict[str, tuple[str, ...]]:
    """Each norm of a layer that products read, and the products.

    The last norm is not among them: its reader is the embedding table, which is looked up as well.
    """
    return {
        "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        config.mlp_norm: ("mlp.gate_proj", "mlp.up_proj"),
    }


def outlier_channels(config: GemmaConfig, count: int = 3) -> list[int]:
    """The channels that `plant_outliers` makes large: the same in every layer, as it is in large models."""
    generator = torch.Generator().manual_seed(config.hidden_size)
    return torch.randperm(config.hidden_size, generator=generator)[:count].sort().values.tolist()


def plant_outliers(source: Path, folder: Path, *, factor: float = 64.0, count: int = 3) -> Path:
    """Writes a checkpoint in fp32 that computes the same function over activations with outlier channels.

    A channel's gain `1 + w` is multiplied by `factor`, and the columns that read the channel are divided by
    it. For a power of two that is exact but for the rounding of w, which is 2^-24 of the gain.

    Args:
        source: A checkpoint's folder, with its tokenizer.
        folder: Where to write a safetensors file under Hugging Face's names, config.json and the tokenizer.
        factor: How much larger a channel becomes.
        count: How many channels of every norm.

    Returns:
        `folder`.

    Raises:
        CheckpointError: The source cannot be read.
    """
    opened = open_source(source)
    weights = {name: tensor.read(0, rows_of(tensor)).float() for name, tensor in opened.weights.items()}
    channels = outlier_channels(opened.config, count)
    for i in range(opened.config.num_layers):
        for norm, products in readers(opened.config).items():
            gain = weights[f"layers.{i}.{norm}.weight"]
            gain[channels] = (factor * (1 + gain[channels].double()) - 1).float()
            for product in products:
                weights[f"layers.{i}.{product}.weight"][:, channels] /= factor
    folder.mkdir(parents=True)
    tensors = {f"model.{name}": weight.contiguous() for name, weight in weights.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads((source / "config.json").read_text())
    settings["torch_dtype"] = "float32"
    (folder / "config.json").write_text(json.dumps(settings, indent=2))
    assert opened.tokenizer is not None
    shutil.copyfile(opened.tokenizer, folder / "tokenizer.model")
    return folder
