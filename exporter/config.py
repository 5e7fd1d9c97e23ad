"""What a Gemma is: its numbers, and what its generation adds to them.

Nothing is derived that a checkpoint states: `head_dim` is a number of its own (for 7B it is not
`hidden_size / num_query_heads`). What makes a generation are fields like any other: no other module asks for
its name, but where a name is what someone else wants to know.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args

from gemma_export.errors import CheckpointError, UsageError
from gemma_export.exporter.config_json import gemma_fields, read_json
from gemma_export.exporter.released import RELEASED, REPOSITORIES

CONFIG_FILE = "config.json"
SHIPPED = {"tiny": "gemma-tiny", "tiny2": "gemma-tiny2"}
"""Names of the models that ship with the project, by size."""
SIZES = (*SHIPPED, *RELEASED)

Family = Literal["gemma", "gemma2"]
"""Generations, by the names that `config.json` gives them."""
LayerKind = Literal["global", "local"]
"""Whether a layer sees all tokens before its own, or those of its window."""


@dataclass(frozen=True)
class GemmaConfig:
    """The numbers that fix a decoder.

    Args:
        name: What to call the model, as in `gemma-2b`.
        vocab_size: Rows V of the embedding table, which is the head too.
        hidden_size: Width d of the residual stream.
        num_layers: Decoder layers.
        num_query_heads: Query heads H.
        num_kv_heads: Key/value heads K; a divisor of H.
        head_dim: Width h of one head.
        intermediate_size: Width f of gate and of up, each; the report counts both together.
        context_length: Positions the model was trained on.
        rms_norm_eps: Added to the mean square in every RMSNorm.
        rope_theta: Base of the rotary embedding's frequencies.
        bos_token_id: Begins every sequence; without it the model is lost.
        eos_token_id: Ends a sequence.
        pad_token_id: Fills; never seen by the model.
        family: The generation's name, for those who want to know one.
        layer_kinds: Of every layer; empty where all are global.
        sliding_window: Tokens that a local layer sees, the query's own among them; None without such layers.
        attention_softcap: c of c * tanh(score / c), on scores before the mask; None for none.
        final_softcap: Likewise on logits.
        query_pre_attn_scalar: Scores are multiplied by this^-0.5; None takes `head_dim`.
        post_norms: Whether what attention and MLP give is normalized on its way into the residual stream.

    Raises:
        CheckpointError: A number no Gemma can have.
    """

    name: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_query_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    context_length: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    bos_token_id: int = 2
    eos_token_id: int = 1
    pad_token_id: int = 0
    family: Family = "gemma"
    layer_kinds: tuple[LayerKind, ...] = ()
    sliding_window: int | None = None
    attention_softcap: float | None = None
    final_softcap: float | None = None
    query_pre_attn_scalar: float | None = None
    post_norms: bool = False

    def __post_init__(self) -> None:
        for field in _COUNTS:
            value = getattr(self, field)
            if not _is_integer(value) or value < 1:
                raise _impossible(self.name, field, value, "a whole number of at least 1")
        for field in _POSITIVE:
            value = getattr(self, field)
            if value is None and field in _OPTIONAL:
                continue
            if not _is_number(value) or not (math.isfinite(value) and value > 0):
                raise _impossible(self.name, field, value, "a positive number")
        for field in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(self, field)
            if not _is_integer(value) or not 0 <= value < self.vocab_size:
                raise _impossible(self.name, field, value, f"a token below vocab_size {self.vocab_size}")
        if self.num_query_heads % self.num_kv_heads:
            raise _impossible(
                self.name,
                "num_kv_heads",
                self.num_kv_heads,
                f"a divisor of the {self.num_query_heads} query heads",
            )
        if self.head_dim % 2:
            raise _impossible(self.name, "head_dim", self.head_dim, "even: RoPE turns pairs")
        self._check_layer_kinds()

    def _check_layer_kinds(self) -> None:
        kinds, window = self.layer_kinds, self.sliding_window
        if kinds and len(kinds) != self.num_layers:
            expected = f"one for each of the {self.num_layers} layers"
            raise _impossible(self.name, "layer_kinds", len(kinds), expected)
        if not set(kinds) <= set(get_args(LayerKind)):
            raise _impossible(self.name, "layer_kinds", kinds, "'global' or 'local' for each layer")
        if window is not None and (not _is_integer(window) or window < 1):
            raise _impossible(self.name, "sliding_window", window, "a whole number of at least 1")
        if "local" in kinds and window is None:
            raise _impossible(self.name, "sliding_window", window, "a number, as some layers are local")

    @property
    def windows(self) -> tuple[int | None, ...]:
        """How many tokens each layer sees, its own among them; None where it sees all before it."""
        if not self.layer_kinds:
            return (None,) * self.num_layers
        return tuple(self.sliding_window if kind == "local" else None for kind in self.layer_kinds)

    @property
    def attention_scale(self) -> float:
        """What scores are multiplied by."""
        scalar = self.head_dim if self.query_pre_attn_scalar is None else self.query_pre_attn_scalar
        return float(scalar**-0.5)

    @property
    def mlp_norm(self) -> str:
        """The norm whose output gate and up read, by its name in a layer.

        Without post-norms it is called for what it comes after, as in every checkpoint of that generation.
        """
        return "pre_feedforward_layernorm" if self.post_norms else "post_attention_layernorm"

    @property
    def layer_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name within a layer → shape of its weight, in the order a layer uses them."""
        d, f, h = self.hidden_size, self.intermediate_size, self.head_dim
        queries, keys = self.num_query_heads * h, self.num_kv_heads * h
        shapes: dict[str, tuple[int, ...]] = {
            "input_layernorm": (d,),
            "self_attn.q_proj": (queries, d),
            "self_attn.k_proj": (keys, d),
            "self_attn.v_proj": (keys, d),
            "self_attn.o_proj": (d, queries),
            "post_attention_layernorm": (d,),
        }
        if self.post_norms:
            shapes["pre_feedforward_layernorm"] = (d,)
        shapes |= {"mlp.gate_proj": (f, d), "mlp.up_proj": (f, d), "mlp.down_proj": (d, f)}
        if self.post_norms:
            shapes["post_feedforward_layernorm"] = (d,)
        return shapes

    @property
    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Canonical name → shape of every weight, in the order the model uses them (docs/design.md)."""
        layer = self.layer_shapes
        shapes: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (self.vocab_size, self.hidden_size)}
        for i in range(self.num_layers):
            shapes |= {f"layers.{i}.{part}.weight": shape for part, shape in layer.items()}
        shapes["norm.weight"] = (self.hidden_size,)
        return shapes

    @property
    def embedding_parameters(self) -> int:
        """Parameters of the embedding table, counted once (Gemma report, table 2)."""
        return self.vocab_size * self.hidden_size

    @property
    def other_parameters(self) -> int:
        """Parameters of everything but the embedding table (Gemma report, table 2)."""
        return sum(math.prod(shape) for shape in self.weight_shapes.values()) - self.embedding_parameters


_COUNTS = (
    "vocab_size",
    "hidden_size",
    "num_layers",
    "num_query_heads",
    "num_kv_heads",
    "head_dim",
    "intermediate_size",
    "context_length",
)
# What makes a size: not the name, the tokens or the vocabulary, which fine-tunes change.
_SHAPE = (
    "hidden_size",
    "num_layers",
    "num_query_heads",
    "num_kv_heads",
    "head_dim",
    "intermediate_size",
    "layer_kinds",
    "sliding_window",
    "attention_softcap",
    "final_softcap",
    "attention_scale",
    "post_norms",
)
_OPTIONAL = ("attention_softcap", "final_softcap", "query_pre_attn_scalar")
_POSITIVE = ("rms_norm_eps", "rope_theta", *_OPTIONAL)


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _impossible(name: str, field: str, value: object, expected: str) -> CheckpointError:
    return CheckpointError(
        f"{name} has {field} = {value!r}, which must be {expected}.",
        "Take the config.json that came with the checkpoint.",
    )


def tiny_folder(size: str = "tiny") -> Path:
    """The folder of a trained model that ships with the project: a checkpoint like any other."""
    return Path(str(resources.files(f"gemma_export.exporter.{size}")))


def preset(size: str) -> GemmaConfig:
    """The configuration of a size, as it ships or was released.

    Raises:
        UsageError: There is no such size.
    """
    if size in SHIPPED:
        return config_from_json(tiny_folder(size) / CONFIG_FILE, name=SHIPPED[size])
    if size not in RELEASED:
        raise UsageError(f"There is no size {size!r}.", f"The sizes are {', '.join(SIZES)}.")
    return GemmaConfig(**RELEASED[size])


def hub_repositories(size: str) -> tuple[str, ...]:
    """The Hugging Face repositories that hold a size, the base model first; none for what ships."""
    return REPOSITORIES.get(size, ())


def size_of(config: GemmaConfig) -> str | None:
    """The size whose shape a configuration has, whatever its vocabulary and name; or None."""
    return next((size for size in reversed(SIZES) if not _differences(config, preset(size))), None)


def require_size(config: GemmaConfig, size: str) -> None:
    """Sees to it that a checkpoint is of the size that was asked for.

    Raises:
        CheckpointError: It is not; the sentence says where they differ.
        UsageError: There is no such size.
    """
    differences = _differences(config, preset(size))
    if differences:
        actual = size_of(config)
        raise CheckpointError(
            f"--size {size} was asked for, but this checkpoint is "
            f"{f'a {actual}' if actual else 'of no known size'}: it has {', '.join(differences)}.",
            f"Give --size {actual}, or leave --size out."
            if actual
            else "Leave --size out to take it as it is.",
        )


def _differences(config: GemmaConfig, other: GemmaConfig) -> list[str]:
    """Where two shapes differ, as clauses. Between generations everything does, which one clause says."""
    fields = _SHAPE if config.family == other.family else ("family",)
    return [
        f"{field} {getattr(config, field)} instead of {getattr(other, field)}"
        for field in fields
        if getattr(config, field) != getattr(other, field)
    ]


def config_from_json(source: str | Path | Mapping[str, Any], name: str | None = None) -> GemmaConfig:
    """Reads a Hugging Face `config.json`, as transformers 4 or transformers 5 writes it.

    Args:
        source: The file, or what it says.
        name: What to call the model; by default the size's name, or the family's when it is of no known size.

    Raises:
        CheckpointError: It cannot be read, is no Gemma 1 or 2, or asks for something its generation lacks.
    """
    if isinstance(source, Mapping):
        fields = gemma_fields(source, CONFIG_FILE)
    else:
        fields = gemma_fields(read_json(Path(source)), str(source))
    config = GemmaConfig(name=name or fields["family"], **fields)
    size = size_of(config) if name is None else None
    return replace(config, name=preset(size).name) if size else config
