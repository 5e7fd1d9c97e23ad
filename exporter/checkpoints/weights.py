"""Gives a checkpoint's tensors their canonical names and shapes (docs/design.md), whatever form they came in.

Every name of the checkpoint is consumed exactly once: what is missing, misshapen or left over is an error
that names it. A tensor nobody asked for is how a model of another family would slip through.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from gemma_export.errors import CheckpointError
from gemma_export.exporter.checkpoints.checkpoint import Checkpoint
from gemma_export.exporter.checkpoints.tensor import LazyTensor, RowSlice, rows_of
from gemma_export.exporter.config import SIZES, GemmaConfig, preset, require_size

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Naming:
    """How a kind of checkpoint names its tensors.

    Args:
        embedding: Its name for the embedding table, by which the kind is known.
        norm: Its name for the last norm.
        layers: What its names for a layer's tensors begin with, `{i}` being the layer.
        stacked: Its name for a tensor of a layer that is several → the canonical ones, in the order of their
            rows. Every other tensor of a layer has its canonical name.
        ignored: Endings of names that hold no weights: tables that are computed anew.
    """

    embedding: str
    norm: str
    layers: str
    stacked: Mapping[str, tuple[str, ...]]
    ignored: tuple[str, ...]

    def table(self, config: GemmaConfig) -> dict[str, tuple[str, ...]]:
        """Every name in a checkpoint of a model → the canonical names of what is in it."""
        within = {one for parts in self.stacked.values() for one in parts}
        alone = {part: (part,) for part in config.layer_shapes if part not in within}
        table: dict[str, tuple[str, ...]] = {self.embedding: ("embed_tokens.weight",)}
        for i in range(config.num_layers):
            for part, canonical in {**alone, **self.stacked}.items():
                name = f"{self.layers.format(i=i)}.{part}.weight"
                table[name] = tuple(f"layers.{i}.{one}.weight" for one in canonical)
        return table | {self.norm: ("norm.weight",)}


HUGGING_FACE = Naming(
    embedding="model.embed_tokens.weight",
    norm="model.norm.weight",
    layers="model.layers.{i}",
    stacked={},
    ignored=(".rotary_emb.inv_freq",),
)
# Saved from the model without its head.
HUGGING_FACE_BARE = replace(
    HUGGING_FACE, embedding="embed_tokens.weight", norm="norm.weight", layers="layers.{i}"
)
# google/gemma_pytorch, gemma/model.py: one projection gives queries, keys and values, in that order.
GOOGLE = Naming(
    embedding="embedder.weight",
    norm="model.norm.weight",
    layers="model.layers.{i}",
    stacked={"self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")},
    ignored=("freqs_cis",),
)
NAMINGS = (HUGGING_FACE, HUGGING_FACE_BARE, GOOGLE)

# Part of a name that no Gemma 1 or 2 has → what has it.
_TELLTALES = {
    "q_norm": "this is a later Gemma than 2",
    "query_norm": "this is a later Gemma than 2",
    "weight_scaler": "this is one of Google's int8 checkpoints",
    "lora_": "this is a LoRA adapter, or a model that it was not merged into",
    "qweight": "this checkpoint is quantized",
    "weight_scale": "this checkpoint is quantized",
    "quant_state": "this checkpoint is quantized",
    "absmax": "this checkpoint is quantized",
}
_LATER = {"pre_feedforward_layernorm": "this is a later Gemma than 1"}
_ORIGINAL = "Give an unmodified Gemma 1 or 2 checkpoint in fp32, fp16 or bf16."
_HEAD = "lm_head.weight"
_HEAD_SAMPLES = 64


def config_for(checkpoint: Checkpoint, size: str | None = None) -> GemmaConfig:
    """The configuration of a checkpoint: what its `config.json` says, or else what its tensors' shapes say.

    Args:
        checkpoint: The checkpoint.
        size: The size it must have, one of `SIZES`; None takes any.

    Returns:
        The checkpoint's own; without one, the size's, with as many tokens as the embedding table has rows. A
        size is needed for what shapes do not say, such as `head_dim`.

    Raises:
        CheckpointError: It is of another size, or of none that is known.
        UsageError: There is no such size.
    """
    if checkpoint.config is not None:
        if size is not None:
            require_size(checkpoint.config, size)
        return checkpoint.config
    naming = naming_of(checkpoint)
    rows = rows_of(checkpoint[naming.embedding])
    mismatch: str | None = None
    for candidate in [size] if size else SIZES:
        config = replace(preset(candidate), vocab_size=rows)
        mismatch = _mismatch(checkpoint, naming, config)
        if mismatch is None:
            return config
    if size:
        raise CheckpointError(
            f"--size {size} was asked for, but in {checkpoint.source} {mismatch}.",
            "Leave --size out to find the size from the tensors.",
        )
    raise CheckpointError(
        f"{checkpoint.source} has no config.json, and its tensors fit none of the sizes {', '.join(SIZES)}.",
        "Put the config.json that came with the checkpoint beside it.",
    )


def canonical_weights(checkpoint: Checkpoint, config: GemmaConfig) -> dict[str, LazyTensor]:
    """Every weight of the model by its canonical name, in the order of `GemmaConfig.weight_shapes`.

    Args:
        checkpoint: A checkpoint; none of it is read but a few rows of an output head, where it has one.
        config: The model it must hold.

    Raises:
        CheckpointError: A tensor is missing, misshapen, left over, or of a dtype that is not fp32, fp16 or
            bf16; or the output head is not the embedding table.
    """
    naming = naming_of(checkpoint)
    shapes = config.weight_shapes
    remaining: dict[str, LazyTensor] = dict(checkpoint)
    weights: dict[str, LazyTensor] = {}
    for name, canonical in naming.table(config).items():
        tensor = remaining.pop(name, None)
        if tensor is None:
            raise CheckpointError(
                f"{checkpoint.source} has no {name}.", f"The download may be incomplete. {_ORIGINAL}"
            )
        expected = _stacked([shapes[one] for one in canonical])
        if tensor.shape != expected:
            raise CheckpointError(
                f"{name} has the shape {list(tensor.shape)}, but {config.name} has {list(expected)} there.",
                "Give the config.json that belongs to the checkpoint.",
            )
        if tensor.dtype not in DTYPES:
            raise CheckpointError(
                f"{name} is {_dtype_name(tensor)}; only fp32, fp16 and bf16 can be built.", _ORIGINAL
            )
        weights |= _parts(tensor, canonical, shapes)
    head = remaining.pop(_HEAD, None)
    if head is not None:
        _require_tied(head, weights["embed_tokens.weight"])
    leftovers = [name for name in remaining if not name.endswith(naming.ignored)]
    if leftovers:
        raise _leftovers(checkpoint, leftovers)
    return {name: weights[name] for name in shapes}


def naming_of(checkpoint: Checkpoint) -> Naming:
    """How a checkpoint names its tensors.

    Raises:
        CheckpointError: As no Gemma 1 or 2 does.
    """
    telltales = [name for name in checkpoint if _telltale(name)]
    if telltales:
        raise _leftovers(checkpoint, telltales)
    for naming in NAMINGS:
        if naming.embedding in checkpoint:
            return naming
    raise CheckpointError(
        f"{checkpoint.source} has no embedding table: none of "
        f"{', '.join(naming.embedding for naming in NAMINGS)} is in it.",
        _ORIGINAL,
    )


def _stacked(shapes: list[tuple[int, ...]]) -> tuple[int, ...]:
    return (sum(shape[0] for shape in shapes), *shapes[0][1:])


def _parts(
    tensor: LazyTensor, canonical: tuple[str, ...], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, LazyTensor]:
    """The canonical tensors that are stacked in one tensor of a checkpoint."""
    if len(canonical) == 1:
        return {canonical[0]: tensor}
    parts: dict[str, LazyTensor] = {}
    start = 0
    for name in canonical:
        stop = start + shapes[name][0]
        parts[name] = RowSlice(tensor, start, stop)
        start = stop
    return parts


def _mismatch(checkpoint: Checkpoint, naming: Naming, config: GemmaConfig) -> str | None:
    """The first tensor that is not what a configuration says, as a clause; None where all are."""
    shapes = config.weight_shapes
    table = naming.table(config)
    for name, canonical in table.items():
        expected = _stacked([shapes[one] for one in canonical])
        if name not in checkpoint:
            return f"there is no {name}"
        if checkpoint[name].shape != expected:
            return f"{name} has the shape {list(checkpoint[name].shape)} instead of {list(expected)}"
    beyond = f"{naming.layers.format(i=config.num_layers)}."
    return next((f"there is {name}" for name in checkpoint if name.startswith(beyond)), None)


def _require_tied(head: LazyTensor, table: LazyTensor) -> None:
    """Sees to it that an output head is the embedding table, by its shape and by rows spread over it.

    Raises:
        CheckpointError: It is a matrix of its own.
    """
    tied = head.shape == table.shape and head.dtype == table.dtype
    if tied:
        rows = head.shape[0]
        spread = {i * (rows - 1) // (_HEAD_SAMPLES - 1) for i in range(_HEAD_SAMPLES)}
        tied = all(torch.equal(head.read(row, row + 1), table.read(row, row + 1)) for row in spread)
    if not tied:
        raise CheckpointError(
            f"{head.name} is not {table.name}: in a Gemma the output head is the embedding table.",
            _ORIGINAL,
        )


def _leftovers(checkpoint: Checkpoint, names: list[str]) -> CheckpointError:
    what = next((what for name in names if (what := _telltale(name, _TELLTALES | _LATER))), None)
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    why = f"; {what}" if what else ""
    return CheckpointError(
        f"{checkpoint.source} holds what no such Gemma has: {', '.join(names[:5])}{more}{why}.", _ORIGINAL
    )


def _telltale(name: str, telltales: Mapping[str, str] = _TELLTALES) -> str | None:
    return next((what for part, what in telltales.items() if part in name), None)


def _dtype_name(tensor: LazyTensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
