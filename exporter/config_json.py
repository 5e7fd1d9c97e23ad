"""Reads Hugging Face's `config.json` in both its dialects: transformers 4's and transformers 5's.

A field that a generation cannot honour is refused, never dropped: a Gemma 2 read as a Gemma 1 would build,
and talk nonsense.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
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
_TANH = "gelu_pytorch_tanh"
# What a field must say, where it is there at all, for the decoder of this project to be the model.
_FIXED: dict[str, tuple[Any, ...]] = {
    # "gelu" is what the first releases say and not what they mean: the models were trained with tanh.
    "hidden_act": (None, "gelu", _TANH),
    "hidden_activation": (None, "gelu", _TANH),
    "attention_bias": (None, False),
    "tie_word_embeddings": (None, True),
    "use_bidirectional_attention": (None, False),
    "partial_rotary_factor": (None, 1, 1.0),
    "quantization_config": (None,),
}
_LAYER_TYPES = {"sliding_attention": "local", "full_attention": "global"}


@dataclass(frozen=True)
class _Generation:
    """What `config.json` says of a generation.

    Attributes:
        title: What to call it in messages.
        architectures: Of its checkpoints; the first is a whole model.
        fixed: What a field must say, where it is there at all.
        own_fields: Reads the fields that only this generation has, given a file's values and its name.
    """

    title: str
    architectures: tuple[str, ...]
    fixed: Mapping[str, tuple[Any, ...]]
    own_fields: Callable[[Mapping[str, Any], str], dict[str, Any]]


def _gemma_1_fields(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    return {}


def _gemma_2_fields(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Window, soft-caps and scale must be said; but for the scale they may be null, which is none.

    Raises:
        CheckpointError: One is not, or a layer is of a type that is not known.
    """
    keys = {
        "sliding_window": "sliding_window",
        "attn_logit_softcapping": "attention_softcap",
        "final_logit_softcapping": "final_softcap",
        "query_pre_attn_scalar": "query_pre_attn_scalar",
    }
    for key in keys:
        if key not in values or (key == "query_pre_attn_scalar" and values[key] is None):
            raise CheckpointError(f"{where} does not give {key}.", _HINT)
    fields = {field: values[key] for key, field in keys.items()}
    return fields | {"layer_kinds": _layer_kinds(values, where), "post_norms": True}


def _layer_kinds(values: Mapping[str, Any], where: str) -> tuple[str, ...]:
    """Of every layer; transformers 4 did not say it, and every other layer is local, the first among them.

    Raises:
        CheckpointError: A layer is of a type that is not known.
    """
    types = values.get("layer_types")
    if types is None:
        layers = values["num_hidden_layers"]
        # What is no number is refused for itself.
        return tuple("global" if i % 2 else "local" for i in range(layers if isinstance(layers, int) else 0))
    unknown = [one for one in types if one not in _LAYER_TYPES] if isinstance(types, list) else [types]
    if unknown:
        raise CheckpointError(
            f"{where} has a layer of the type {json.dumps(unknown[0], default=str)}; Gemma 2 has only "
            f"{' and '.join(_LAYER_TYPES)}.",
            _HINT,
        )
    return tuple(_LAYER_TYPES[one] for one in types)


_GENERATIONS = {
    "gemma": _Generation("Gemma 1", ("GemmaForCausalLM", "GemmaModel"), _FIXED, _gemma_1_fields),
    "gemma2": _Generation(
        "Gemma 2",
        ("Gemma2ForCausalLM", "Gemma2Model"),
        _FIXED | {"hidden_activation": (None, _TANH)},
        _gemma_2_fields,
    ),
}
"""By `model_type`."""


def gemma_fields(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The numbers of a `config.json`, under this project's names; not yet checked to be possible.

    Args:
        values: What the file says.
        where: What to call the file in messages.

    Returns:
        The fields of `GemmaConfig`, but its name.

    Raises:
        CheckpointError: It is no Gemma 1 or 2, it asks for something its generation lacks, or a number is
            missing.
    """
    family = _family(values, where)
    generation = _GENERATIONS[family]
    _refuse_other_computations(values, generation, where)
    for key in _REQUIRED_KEYS:
        if values.get(key) is None:
            raise CheckpointError(f"{where} does not give {key}.", _HINT)
    keys = _REQUIRED_KEYS | _OPTIONAL_KEYS
    fields = {field: values[key] for key, field in keys.items() if values.get(key) is not None}
    end = fields.get("eos_token_id")
    if isinstance(end, list) and end:
        fields["eos_token_id"] = end[0]  # the others end a turn; the tokenizer knows them
    fields |= {"family": family, "rope_theta": _rope_theta(values, generation, where)}
    return fields | generation.own_fields(values, where)


def _family(values: Mapping[str, Any], where: str) -> str:
    """The generation's key in `_GENERATIONS`.

    Raises:
        CheckpointError: It is none of them, or what is said does not fit together.
    """
    model_type = values.get("model_type")
    architectures = values.get("architectures") or ()
    if not isinstance(architectures, list | tuple):
        architectures = (architectures,)
    if model_type is None and not architectures:
        raise CheckpointError(
            f"{where} does not say what model it describes: it has neither model_type nor architectures.",
            _HINT,
        )
    for family, generation in _GENERATIONS.items():
        if model_type in (None, family) and set(map(str, architectures)) <= set(generation.architectures):
            return family
    known = [name for generation in _GENERATIONS.values() for name in generation.architectures]
    others = [name for name in architectures if name not in known]
    found = others[0] if others and model_type in (None, *_GENERATIONS) else model_type
    raise CheckpointError(
        f"This is a {str(found)!r} checkpoint, as {where} says; only "
        f"{' and '.join(f'{one.title} ({name!r})' for name, one in _GENERATIONS.items())} can be built.",
        "Give a checkpoint of one of them, such as google/gemma-2b or google/gemma-2-9b-it.",
    )


def _refuse_other_computations(values: Mapping[str, Any], generation: _Generation, where: str) -> None:
    for key, accepted in generation.fixed.items():
        value = values.get(key)
        if not any(value is one or (type(value) is type(one) and value == one) for one in accepted):
            said = value.get("quant_method", "yes") if isinstance(value, Mapping) else value
            wanted = " or ".join(json.dumps(one) for one in accepted if one is not None) or "no such field"
            raise CheckpointError(
                f"{where} has {key} = {json.dumps(said, default=str)}, which no {generation.title} has "
                f"({wanted}).",
                f"Give an unmodified {generation.title} checkpoint in fp32, fp16 or bf16.",
            )


def _rope_theta(values: Mapping[str, Any], generation: _Generation, where: str) -> Any:
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
                f"{where} asks in {key} for rotary embeddings of {said}; {generation.title} has only "
                "'default'.",
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
