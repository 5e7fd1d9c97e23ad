"""Reads Hugging Face's `config.json` in both its dialects: transformers 4's and transformers 5's.

A field that this family cannot honour is refused, never dropped: a Gemma 2 read as a Gemma 1 would build,
and talk nonsense.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gemma_export.errors import CheckpointError

_HINT = "Take the config.json that came with the checkpoint."

_REQUIRED_KEYS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_query_heads",
    "num_key_value_heads": "num_kv_heads",
    "head_dim": "head_dim",
    "intermediate_size": "intermediate_size",
    "max_position_embeddings": "context_length",
}
_OPTIONAL_KEYS = {
    "rms_norm_eps": "rms_norm_eps",
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
    "pad_token_id": "pad_token_id",
}
# "gelu" is what the first releases say and not what they mean: the models were trained with tanh.
_ACTIVATIONS = ("gelu", "gelu_pytorch_tanh")
_ARCHITECTURES = ("GemmaForCausalLM", "GemmaModel")
# What a field must say, where it is there at all, for the decoder of this project to be the model.
_FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": (None, *_ACTIVATIONS),
    "hidden_activation": (None, *_ACTIVATIONS),
    "attention_bias": (None, False),
    "tie_word_embeddings": (None, True),
    "use_bidirectional_attention": (None, False),
    "partial_rotary_factor": (None, 1, 1.0),
    "quantization_config": (None,),
}


def gemma_fields(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The numbers of a `config.json`, under this project's names; not yet checked to be possible.

    Args:
        values: What the file says.
        where: What to call the file in messages.

    Returns:
        The fields of `GemmaConfig`, but its name.

    Raises:
        CheckpointError: It is not a Gemma 1, it asks for something this family lacks, or a number is missing.
    """
    _refuse_other_families(values, where)
    _refuse_other_computations(values, where)
    for key in _REQUIRED_KEYS:
        if values.get(key) is None:
            raise CheckpointError(f"{where} does not give {key}.", _HINT)
    keys = _REQUIRED_KEYS | _OPTIONAL_KEYS
    fields = {field: values[key] for key, field in keys.items() if values.get(key) is not None}
    end = fields.get("eos_token_id")
    if isinstance(end, list) and end:
        fields["eos_token_id"] = end[0]  # the others end a turn; the tokenizer knows them
    return fields | {"rope_theta": _rope_theta(values, where)}


def _refuse_other_families(values: Mapping[str, Any], where: str) -> None:
    model_type = values.get("model_type")
    architectures = values.get("architectures") or ()
    if not isinstance(architectures, list | tuple):
        architectures = (architectures,)
    others = [name for name in architectures if name not in _ARCHITECTURES]
    found = others[0] if others and model_type in (None, "gemma") else model_type
    if found is None and not architectures:
        raise CheckpointError(
            f"{where} does not say what model it describes: it has neither model_type nor architectures.",
            _HINT,
        )
    if others or model_type not in (None, "gemma"):
        raise CheckpointError(
            f"This is a {str(found)!r} checkpoint, as {where} says; only Gemma 1 ('gemma') can be built.",
            "Give a checkpoint of Gemma 1, such as google/gemma-2b or google/gemma-1.1-7b-it.",
        )


def _refuse_other_computations(values: Mapping[str, Any], where: str) -> None:
    for key, accepted in _FIXED.items():
        value = values.get(key)
        if not any(value is one or (type(value) is type(one) and value == one) for one in accepted):
            said = value.get("quant_method", "yes") if isinstance(value, Mapping) else value
            wanted = " or ".join(json.dumps(one) for one in accepted if one is not None) or "no such field"
            raise CheckpointError(
                f"{where} has {key} = {json.dumps(said, default=str)}, which no Gemma 1 has ({wanted}).",
                "Give an unmodified Gemma 1 checkpoint in fp32, fp16 or bf16.",
            )


def _rope_theta(values: Mapping[str, Any], where: str) -> Any:
    """Theta, from either dialect; any rope but the plain one is refused.

    Raises:
        CheckpointError: The type of rope is another, or is not said where it must be.
    """
    theta = values.get("rope_theta")
    for key in ("rope_parameters", "rope_scaling"):
        rope = values.get(key)
        if rope is None:
            continue
        kind = rope.get("rope_type", rope.get("type")) if isinstance(rope, Mapping) else rope
        unknown = set(rope) - {"rope_type", "type", "rope_theta"} if isinstance(rope, Mapping) else ()
        if kind != "default" or unknown:
            said = f"the type {kind!r}" + (f" with {', '.join(sorted(map(str, unknown)))}" if unknown else "")
            raise CheckpointError(
                f"{where} asks in {key} for rotary embeddings of {said}; Gemma 1 has only 'default'.",
                "Give a checkpoint whose context was not extended.",
            )
        theta = rope.get("rope_theta", theta)
    return 10000.0 if theta is None else theta


def read_json(path: Path) -> Mapping[str, Any]:
    """The JSON object in a checkpoint's file.

    Raises:
        CheckpointError: The file cannot be read, or holds anything else.
    """
    try:
        values = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read: {error.strerror or error}.", "Download the checkpoint again."
        ) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is not JSON: it is damaged or cut short.", "Download the checkpoint again."
        ) from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} is JSON, but not an object.", "Download the checkpoint again.")
    return values
