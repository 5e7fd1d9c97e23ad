"""Checkpoints to measure on: bf16 safetensors of random weights, written block by block."""

import json
import struct
from pathlib import Path

import torch

from gemma_export.exporter.checkpoints.checkpoint import RandomCheckpoint
from gemma_export.exporter.config import GemmaConfig
from gemma_export.exporter.tokenizer.random import write_random_tokenizer

BLOCK_BYTES = 16 << 20


def write_checkpoint(config: GemmaConfig, folder: Path, seed: int = 0) -> None:
    """Writes a folder as one gets it from Hugging Face: one safetensors file, config.json, tokenizer.model.

    The library's own writer takes all tensors at once; a checkpoint of this size must be streamed.
    """
    folder.mkdir(parents=True)
    tensors = RandomCheckpoint(config, seed, torch.bfloat16)
    header, end = {}, 0
    for name, tensor in tensors.items():
        size = 2 * torch.Size(tensor.shape).numel()
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [end, end + size]}
        end += size
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for tensor in tensors.values():
            rows = tensor.shape[0]
            step = max(1, BLOCK_BYTES * rows // (2 * torch.Size(tensor.shape).numel()))
            for start in range(0, rows, step):
                block = tensor.read(start, min(start + step, rows))
                file.write(block.reshape(-1).view(torch.uint8).numpy().data)
    write_random_tokenizer(folder / "tokenizer.model", config.vocab_size)
    (folder / "config.json").write_text(json.dumps(_settings(config), indent=2))


def _settings(config: GemmaConfig) -> dict[str, object]:
    return {
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
        "rope_theta": config.rope_theta,
        "hidden_activation": "gelu_pytorch_tanh",
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
    }
