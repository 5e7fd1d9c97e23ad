"""Whether an engine is what its manifest says: its tensors, its profiles, and where a cache's update goes."""

from gemma_export.errors import BundleError
from gemma_export.runtime.backend import INPUT_IDS, LOGITS, POSITION_IDS, cache_names
from gemma_export.runtime.manifest import EngineInfo, Manifest
from gemma_export.runtime.tensorrt_engine import Engine
from gemma_export.runtime.tensorrt_steps import plan_step

# TensorRT's own spelling; an int8 cache has none, because its cache update takes floats only.
_TYPES = {"float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16"}


def check_contract(engine: Engine, info: EngineInfo, manifest: Manifest) -> None:
    """Refuses an engine whose tensors or profiles are not those that its manifest promises.

    Raises:
        BundleError: They are not.
    """
    cache = _TYPES.get(manifest.cache_dtype, manifest.cache_dtype)
    wanted = {INPUT_IDS: ("INPUT", "INT64"), POSITION_IDS: ("INPUT", "INT64"), LOGITS: ("OUTPUT", "FLOAT")}
    layers = list(cache_names(manifest.model.num_layers))
    for past_key, past_value, key, value in layers:
        wanted |= dict.fromkeys((past_key, past_value), ("INPUT", cache))
        wanted |= dict.fromkeys((key, value), ("OUTPUT", cache))
    found = engine.tensors
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            raise _other(info, f"{name} is {_spelled(found.get(name))}, not {_spelled(wanted.get(name))}")
    for past_key, past_value, key, value in layers:
        for past, present in ((past_key, key), (past_value, value)):
            if engine.aliased_input(present) not in (None, past):
                raise _other(info, f"{present} is written in place of {engine.aliased_input(present)}")
    _check_profiles(engine, info, manifest)


def _check_profiles(engine: Engine, info: EngineInfo, manifest: Manifest) -> None:
    if engine.profiles != len(info.profiles):
        raise _other(info, f"it has {engine.profiles} profiles, not {len(info.profiles)}")
    model, graph = manifest.model, manifest.graph
    slots = graph.layer_slots(model.num_layers)
    pasts = {names[0]: size for names, size in zip(cache_names(model.num_layers), slots, strict=True)}
    for index, profile in enumerate(info.profiles):
        rows = [getattr(profile.batch, end) for end in ("min", "opt", "max")]
        tokens = [getattr(profile.tokens, end) for end in ("min", "opt", "max")]
        promised: dict[str, tuple[tuple[int, ...], ...]] = {
            INPUT_IDS: tuple(zip(rows, tokens, strict=True)),
            **{
                past: tuple((batch, model.num_kv_heads, size, model.head_dim) for batch in rows)
                for past, size in pasts.items()
            },
        }
        for name, shapes in promised.items():
            if (found := engine.profile_shapes(name, index)) != shapes:
                raise _other(info, f"its profile {profile.name} has {name} as {found}, not {shapes}")
    for tokens_of_row in (1, 2):
        # A row of a batch has memory for itself only.
        if any(launch.padded > 1 for launch in plan_step(info.profiles, 1, tokens_of_row)):
            raise _other(info, f"no profile runs one row of {tokens_of_row} tokens")


def _spelled(tensor: tuple[str, str] | None) -> str:
    return " ".join(reversed(tensor)) if tensor else "no tensor"


def _other(info: EngineInfo, why: str) -> BundleError:
    return BundleError(
        f"The engine {info.file} is not the one that the manifest describes: {why}.",
        "Compile it again with `gemma-export compile`, or fetch the bundle again.",
    )
