"""Writes and reads a model as a Hugging Face folder of the kind that Gemma is published in."""

import json
import os
from pathlib import Path

import torch
from safetensors.torch import save
from transformers import AutoModelForCausalLM, PreTrainedModel

from recipes.tiny.tokenizer import BOS, END_OF_TURN, EOS, PAD
from recipes.tiny.train import ROPE_THETA

SECOND = ("sliding_window", "attn_logit_softcapping", "final_logit_softcapping", "query_pre_attn_scalar")
"""What only the second generation's configuration says."""


def write(folder: Path, name: str, content: bytes) -> None:
    """Puts a file in place whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"{name}.partial"
    partial.write_bytes(content)
    os.replace(partial, folder / name)


def write_json(folder: Path, name: str, content: object) -> None:
    """Puts a JSON file in place, indented by two."""
    write(folder, name, (json.dumps(content, indent=2) + "\n").encode())


def write_model(folder: Path, model: PreTrainedModel) -> None:
    """Rounds the weights to bfloat16 and writes them with their configuration.

    Args:
        folder: Where ``config.json``, ``generation_config.json`` and ``model.safetensors`` go.
        model: The trained model; its head is the embedding matrix and is not stored again.
    """
    shape = model.config
    activation = "gelu_pytorch_tanh"
    write_json(
        folder,
        "config.json",
        {
            "architectures": [type(model).__name__],
            "model_type": shape.model_type,
            "vocab_size": shape.vocab_size,
            "hidden_size": shape.hidden_size,
            "intermediate_size": shape.intermediate_size,
            "num_hidden_layers": shape.num_hidden_layers,
            "num_attention_heads": shape.num_attention_heads,
            "num_key_value_heads": shape.num_key_value_heads,
            "head_dim": shape.head_dim,
            "hidden_act": activation,
            "hidden_activation": activation,
            **{name: getattr(shape, name) for name in SECOND if hasattr(shape, name)},
            "max_position_embeddings": shape.max_position_embeddings,
            "rms_norm_eps": shape.rms_norm_eps,
            "rope_theta": ROPE_THETA,
            "rope_scaling": None,
            "attention_bias": False,
            "attention_dropout": 0.0,
            "initializer_range": shape.initializer_range,
            "tie_word_embeddings": True,
            "pad_token_id": PAD,
            "eos_token_id": EOS,
            "bos_token_id": BOS,
            "torch_dtype": "bfloat16",
            "use_cache": True,
        },
    )
    write_json(
        folder,
        "generation_config.json",
        {"pad_token_id": PAD, "eos_token_id": [EOS, END_OF_TURN], "bos_token_id": BOS},
    )
    weights = {
        name: weight.detach().to(torch.bfloat16).contiguous()
        for name, weight in model.state_dict().items()
        if name != "lm_head.weight"
    }
    write(folder, "model.safetensors", save(weights, metadata={"format": "pt"}))


def read_model(folder: Path) -> PreTrainedModel:
    """Loads the model as a user would, with the rounded weights held in float32.

    Args:
        folder: What ``write_model`` wrote.
    """
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.eval()
    return model
