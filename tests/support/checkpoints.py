"""Writes little Gemma checkpoints, in every form there is, from one state dict."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from gemma_export.errors import CheckpointError
from gemma_export.exporter.checkpoints.checkpoint import LazyTensor, open_checkpoint
from gemma_export.exporter.config import GemmaConfig

INDEX = "model.safetensors.index.json"
SHARD = "model-00002-of-00003.safetensors"
REVISION = "0123456789abcdef0123456789abcdef01234567"

# Every size is different, so that no two weights can be taken for each other by shape.
LITTLE = GemmaConfig(
    name="gemma",
    vocab_size=96,
    hidden_size=24,
    num_layers=3,
    num_query_heads=4,
    num_kv_heads=2,
    head_dim=8,
    intermediate_size=40,
    context_length=64,
)


# The same with everything that the second generation adds; the scale is not that of the heads' width.
LITTLE_2 = replace(
    LITTLE,
    name="gemma2",
    family="gemma2",
    layer_kinds=("local", "global", "local"),
    sliding_window=8,
    attention_softcap=5.0,
    final_softcap=3.0,
    query_pre_attn_scalar=12,
    post_norms=True,
)


def state_dict(
    config: GemmaConfig = LITTLE, dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> dict[str, torch.Tensor]:
    """Random weights under Hugging Face's names."""
    generator = torch.Generator().manual_seed(seed)
    return {
        f"model.{name}": torch.randn(shape, generator=generator).to(dtype)
        for name, shape in config.weight_shapes.items()
    }


def google_state_dict(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same weights as google/gemma_pytorch names them: queries, keys and values in one projection."""
    google: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        if name.endswith("q_proj.weight"):
            names = [name.replace("q_proj", part) for part in ("q_proj", "k_proj", "v_proj")]
            google[name.replace("q_proj", "qkv_proj")] = torch.cat([state[one] for one in names])
        elif name == "model.embed_tokens.weight":
            google["embedder.weight"] = tensor
        elif not name.endswith(("k_proj.weight", "v_proj.weight")):
            google[name] = tensor
    return google


def config_json(config: GemmaConfig = LITTLE, transformers: int = 5, **changes: Any) -> dict[str, Any]:
    """What transformers 4 or 5 writes for a configuration; a change to None leaves the field out."""
    values: dict[str, Any] = {
        "architectures": ["GemmaForCausalLM"],
        "model_type": "gemma",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_query_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.context_length,
        "rms_norm_eps": config.rms_norm_eps,
        "hidden_act": "gelu_pytorch_tanh",
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
        "attention_bias": False,
    }
    if transformers == 4:
        values |= {
            "rope_theta": config.rope_theta,
            "rope_scaling": None,
            "torch_dtype": "bfloat16",
            "hidden_act": "gelu",
            "hidden_activation": None,
        }
    else:
        values |= {
            "rope_parameters": {"rope_theta": config.rope_theta, "rope_type": "default"},
            "dtype": "bfloat16",
            "tie_word_embeddings": True,
        }
    if config.family == "gemma2":
        values |= {
            "architectures": ["Gemma2ForCausalLM"],
            "model_type": "gemma2",
            "hidden_activation": "gelu_pytorch_tanh",
            "sliding_window": config.sliding_window,
            "attn_logit_softcapping": config.attention_softcap,
            "final_logit_softcapping": config.final_softcap,
            "query_pre_attn_scalar": config.query_pre_attn_scalar,
        }
        if transformers == 5:
            types = {"local": "sliding_attention", "global": "full_attention"}
            values["layer_types"] = [types[kind] for kind in config.layer_kinds]
    values |= changes
    return {key: value for key, value in values.items() if key not in changes or value is not None}


def write_config(folder: Path, config: GemmaConfig | None = LITTLE, **changes: Any) -> None:
    """Writes `config.json`, or nothing for None."""
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config_json(config, **changes)))


def write_single(
    folder: Path, state: Mapping[str, torch.Tensor], config: GemmaConfig | None = LITTLE
) -> Path:
    """A folder with `model.safetensors`."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(dict(state), folder / "model.safetensors", metadata={"format": "pt"})
    write_config(folder, config)
    return folder


def write_sharded(
    folder: Path, state: Mapping[str, torch.Tensor], config: GemmaConfig | None = LITTLE, shards: int = 3
) -> Path:
    """A folder with shards and `model.safetensors.index.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    weight_map: dict[str, str] = {}
    for number in range(shards):
        shard = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: state[name] for name in list(state)[number::shards]}
        save_file(part, folder / shard, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, shard)
    size = sum(tensor.nbytes for tensor in state.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    write_config(folder, config)
    return folder


def write_google(
    folder: Path, state: Mapping[str, torch.Tensor], name: str = "gemma-2b.ckpt", **content: Any
) -> Path:
    """A folder with one `.ckpt` file: Google's names, and the buffer that its model saves with them."""
    folder.mkdir(parents=True, exist_ok=True)
    google = google_state_dict(state) | {"freqs_cis": torch.zeros(4, 4, dtype=torch.complex64)}
    torch.save({"model_state_dict": google} | content, folder / name)
    return folder


def write_hub_cache(cache: Path, repository: str, folder: Path, revision: str = REVISION) -> Path:
    """Moves a folder into a Hugging Face cache: its files become blobs, and a snapshot links to them.

    Returns:
        The snapshot's folder.
    """
    home = cache / f"models--{repository.replace('/', '--')}"
    snapshot = home / "snapshots" / revision
    for part in (home / "blobs", home / "refs", snapshot):
        part.mkdir(parents=True)
    (home / "refs" / "main").write_text(revision)
    for number, file in enumerate(sorted(folder.iterdir())):
        file.rename(home / "blobs" / f"blob{number}")
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", f"blob{number}"))
    return snapshot


def read_all(tensor: LazyTensor) -> torch.Tensor:
    return tensor.read(0, tensor.shape[0])


def assert_holds(checkpoint: Mapping[str, LazyTensor], state: Mapping[str, torch.Tensor]) -> None:
    assert set(checkpoint) == set(state)
    for name, expected in state.items():
        tensor = checkpoint[name]
        assert (tensor.name, tensor.shape, tensor.dtype) == (name, tuple(expected.shape), expected.dtype)
        assert torch.equal(read_all(tensor), expected)


def refused(path: Path, said: str) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    assert said in caught.value.message
    assert caught.value.hint
    return caught.value
