"""The files that let other clients run a bundle as it is: `genai_config.json` and `generation_config.json`.

onnxruntime-genai reads the first: it tells the names of the graph's inputs and outputs, the model's shape and
how to search. It throws on a key it does not know, so there is nothing in it but what it needs. The format of
the caches, int8 among them, it takes from the graph.

Where local layers' caches roll, it is told their length and to read a prompt in chunks of the size they take.
It reads a first prompt so, and later tokens all at once: those that a rolling cache cannot take, the graph's
own operator refuses (`exporter.decoder.written_slots`).

The graph has no padding (docs/design.md), and onnxruntime-genai pads the shorter rows of a batch on the left:
it may run a batch only of prompts of one length.

Source: microsoft/onnxruntime-genai `src/config.h` and `src/config.cpp`, release 0.18.
"""

import json
from pathlib import Path
from typing import Any

from gemma_export.exporter.config import GemmaConfig
from gemma_export.exporter.tokenizer.files import TokenizerFacts
from gemma_export.runtime.rolling import RollingCache

GENAI_CONFIG = "genai_config.json"
GENERATION_CONFIG = "generation_config.json"


def genai_config(
    config: GemmaConfig,
    tokenizer: TokenizerFacts,
    *,
    max_length: int,
    graph_file: str = "model.onnx",
    rolling: RollingCache | None = None,
) -> dict[str, Any]:
    """What onnxruntime-genai has to know of a bundle.

    Args:
        config: The model's shape.
        tokenizer: The ids of the control tokens.
        max_length: S, the slots of a cache row.
        graph_file: The graph's file, relative to the bundle.
        rolling: Which caches roll; None where none does.
    """
    caches: dict[str, Any] = {}
    if rolling is not None:
        caches["sliding_window"] = {
            # It makes a cache of window_size + chunk_size - 1 slots.
            "window_size": rolling.slots - rolling.chunk + 1,
            "slide_key_value_cache": False,
            "slide_inputs": False,
            "layers": list(rolling.layers),
        }
    return {
        "model": {
            "type": config.family,
            "vocab_size": config.vocab_size,
            # The model may know a longer context than the cache can hold. With S here, a search for more
            # tokens is refused before it begins.
            "context_length": max_length,
            "bos_token_id": tokenizer.bos,
            "eos_token_id": list(tokenizer.stop_ids),
            "pad_token_id": tokenizer.pad,
            "decoder": {
                "filename": graph_file,
                "hidden_size": config.hidden_size,
                "head_size": config.head_dim,
                "num_attention_heads": config.num_query_heads,
                "num_key_value_heads": config.num_kv_heads,
                "num_hidden_layers": config.num_layers,
                # Errors are told. Of an input with a default, which it need not know, it would warn.
                "session_options": {"log_severity_level": 3, "provider_options": []},
                "inputs": {
                    "input_ids": "input_ids",
                    "position_ids": "position_ids",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
                **caches,
            },
        },
        "search": {
            "do_sample": False,
            "max_length": max_length,
            # The graph writes new keys and values into the buffer it was given.
            "past_present_share_buffer": True,
            **({} if rolling is None else {"chunk_size": rolling.chunk}),
        },
    }


def generation_config(tokenizer: TokenizerFacts, *, max_length: int) -> dict[str, Any]:
    """Hugging Face's form of the defaults of a generation.

    Args:
        tokenizer: The ids of the control tokens.
        max_length: S, the slots of a cache row: a prompt and its answer together have no more tokens.
    """
    return {
        "bos_token_id": tokenizer.bos,
        "eos_token_id": list(tokenizer.stop_ids),
        "pad_token_id": tokenizer.pad,
        "do_sample": False,
        "max_length": max_length,
    }


def write_genai_config(
    folder: Path,
    config: GemmaConfig,
    tokenizer: TokenizerFacts,
    *,
    max_length: int,
    graph_file: str = "model.onnx",
    rolling: RollingCache | None = None,
) -> None:
    """Writes `genai_config.json` and `generation_config.json`; the arguments are `genai_config`'s.

    Raises:
        OSError: The folder cannot be written.
    """
    settings = genai_config(config, tokenizer, max_length=max_length, graph_file=graph_file, rolling=rolling)
    _write(folder / GENAI_CONFIG, settings)
    _write(folder / GENERATION_CONFIG, generation_config(tokenizer, max_length=max_length))


def _write(path: Path, settings: dict[str, Any]) -> None:
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
