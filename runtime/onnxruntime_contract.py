"""Whether a graph that onnxruntime has loaded is the one that its manifest describes."""

from collections.abc import Iterable, Sequence
from typing import Any

from gemma_export.errors import BundleError
from gemma_export.runtime.backend import (
    INPUT_IDS,
    LOGITS,
    POSITION_IDS,
    TAIL_LOGITS,
    TAIL_START,
    cache_names,
)
from gemma_export.runtime.manifest import Manifest

# onnxruntime's spelling of the types that a cache or the logits may have.
_ORT_TYPE = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(bfloat16)": "bfloat16",
    "tensor(int8)": "int8",
}


def check_contract(session: Any, manifest: Manifest) -> bool:
    """Refuses a graph whose inputs, outputs or caches are not those its manifest promises.

    Args:
        session: An `onnxruntime.InferenceSession`.
        manifest: What it must be.

    Returns:
        Whether it has the optional input and output for the logits of the last few tokens.

    Raises:
        BundleError: It is another.
    """
    names = list(cache_names(manifest.model.num_layers))
    wanted_inputs = {INPUT_IDS, POSITION_IDS, *(name for past in names for name in past[:2])}
    wanted_outputs = {LOGITS, *(name for present in names for name in present[2:])}
    has_tail = TAIL_START in (value.name for value in session.get_overridable_initializers())
    if has_tail:
        wanted_outputs.add(TAIL_LOGITS)
    inputs = {value.name: value for value in session.get_inputs()}
    outputs = {value.name: value for value in session.get_outputs()}
    _check_names("inputs", wanted_inputs, inputs)
    _check_names("outputs", wanted_outputs, outputs)
    model, graph = manifest.model, manifest.graph
    _check_scales(manifest)
    tensors = {value.name: value for value in (*inputs.values(), *outputs.values())}
    for layer, slots in zip(names, graph.layer_slots(model.num_layers), strict=True):
        for name in layer:
            shape = [None, model.num_kv_heads, slots, model.head_dim]
            _check_tensor(tensors[name], manifest.cache_dtype, shape)
    logits = outputs[LOGITS]
    _check_tensor(logits, "float32", [None, None, model.vocab_size])
    # The last token's logits are declared as 1, those of all tokens as a free dimension.
    tokens = logits.shape[1]
    if (tokens == 1) != (graph.logits == "last"):
        raise _other_contract(f"it gives the logits of {tokens} tokens, the manifest says {graph.logits}")
    if has_tail:
        _check_tensor(outputs[TAIL_LOGITS], "float32", [None, None, model.vocab_size])
    return has_tail


def _check_scales(manifest: Manifest) -> None:
    """Refuses an int8 cache whose codes nobody could read, and scales of a cache that has no codes."""
    model = manifest.model
    heads = [(len(layer.key), len(layer.value)) for layer in manifest.cache_scales]
    if manifest.cache_dtype != "int8" and heads:
        raise _other_contract(f"the manifest has scales of a cache that is {manifest.cache_dtype}")
    if manifest.cache_dtype == "int8" and heads != [(model.num_kv_heads,) * 2] * model.num_layers:
        raise _other_contract(
            f"its int8 cache has {model.num_layers} layers of {model.num_kv_heads} KV heads, "
            f"the manifest has the scales of {heads or 'none'}"
        )


def _check_tensor(value: Any, dtype: str, shape: Sequence[int | None]) -> None:
    """`shape` is as the graph must have it; None is any dimension."""
    fits = len(value.shape) == len(shape) and all(
        wanted is None or found == wanted for found, wanted in zip(value.shape, shape, strict=True)
    )
    if _ORT_TYPE.get(value.type) != dtype or not fits:
        promised = ["any" if size is None else size for size in shape]
        raise _other_contract(
            f"{value.name} is {value.type} {value.shape}, the manifest says {dtype} {promised}"
        )


def _check_names(what: str, wanted: set[str], found: Iterable[str]) -> None:
    missing, unknown = wanted - set(found), set(found) - wanted
    if missing or unknown:
        raise _other_contract(
            f"its {what} "
            + " and ".join(
                f"{verb} {', '.join(sorted(names)[:4])}"
                for verb, names in (("lack", missing), ("have the unknown", unknown))
                if names
            )
        )


def _other_contract(why: str) -> BundleError:
    return BundleError(
        f"The graph is not the one its manifest describes: {why}.",
        "Build the bundle again, or fetch it again.",
    )
