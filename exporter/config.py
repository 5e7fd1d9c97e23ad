"""What a Gemma is: its numbers, and the sizes that were released.

Nothing is derived that a checkpoint states: `head_dim` is a number of its own (for 7B it is not
`hidden_size / num_query_heads`).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

from gemma_export.errors import CheckpointError, UsageError
from gemma_export.exporter.config_json import gemma_fields, read_json

CONFIG_FILE = "config.json"
SIZES = ("tiny", "2b", "7b")


@dataclass(frozen=True)
class GemmaConfig:
    """The numbers that fix a Gemma 1 decoder.

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

    def __post_init__(self) -> None:
        for field in _COUNTS:
            value = getattr(self, field)
            if not _is_integer(value) or value < 1:
                raise _impossible(self.name, field, value, "a whole number of at least 1")
        for field in ("rms_norm_eps", "rope_theta"):
            value = getattr(self, field)
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

    @property
    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Canonical name → shape of every weight, in the order the model uses them (docs/design.md)."""
        d, f, h = self.hidden_size, self.intermediate_size, self.head_dim
        queries, keys = self.num_query_heads * h, self.num_kv_heads * h
        shapes: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (self.vocab_size, d)}
        for i in range(self.num_layers):
            layer = {
                "input_layernorm": (d,),
                "self_attn.q_proj": (queries, d),
                "self_attn.k_proj": (keys, d),
                "self_attn.v_proj": (keys, d),
                "self_attn.o_proj": (d, queries),
                "post_attention_layernorm": (d,),
                "mlp.gate_proj": (f, d),
                "mlp.up_proj": (f, d),
                "mlp.down_proj": (d, f),
            }
            shapes |= {f"layers.{i}.{part}.weight": shape for part, shape in layer.items()}
        shapes["norm.weight"] = (d,)
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
_SHAPE = ("hidden_size", "num_layers", "num_query_heads", "num_kv_heads", "head_dim", "intermediate_size")


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _impossible(name: str, field: str, value: object, expected: str) -> CheckpointError:
    return CheckpointError(
        f"{name} has {field} = {value!r}, which must be {expected}.",
        "Take the config.json that came with the checkpoint.",
    )


# "Gemma: Open Models Based on Gemini Research and Technology" (arXiv 2403.08295), table 1: d_model, layers,
# feed-forward hidden dims, heads, KV heads, head size, context 8192. Its feed-forward figure counts gate and
# up together, so 32768 is 2 x 16384. Its vocabulary, 256128, is padded: the released tables have 256000 rows.
_RELEASED = {
    "2b": GemmaConfig(
        name="gemma-2b",
        vocab_size=256_000,  # rows of the released table
        hidden_size=2048,  # table 1, d_model
        num_layers=18,  # table 1, layers
        num_query_heads=8,  # table 1, num heads
        num_kv_heads=1,  # table 1, num KV heads: multi-query attention
        head_dim=256,  # table 1, head size
        intermediate_size=16_384,  # table 1, feedforward hidden dims 32768, halved
        context_length=8192,  # section 2, "trained on a context length of 8192 tokens"
    ),
    "7b": GemmaConfig(
        name="gemma-7b",
        vocab_size=256_000,  # rows of the released table
        hidden_size=3072,  # table 1, d_model
        num_layers=28,  # table 1, layers
        num_query_heads=16,  # table 1, num heads
        num_kv_heads=16,  # table 1, num KV heads: multi-head attention
        head_dim=256,  # table 1, head size: not 3072 / 16
        intermediate_size=24_576,  # table 1, feedforward hidden dims 49152, halved
        context_length=8192,  # section 2
    ),
}

# Where the local Hugging Face cache is looked up, in this order: the base model, then its relatives.
_REPOSITORIES = {
    "2b": (
        "google/gemma-2b",
        "google/gemma-1.1-2b-it",
        "google/gemma-2b-it",
        "google/codegemma-2b",
        "google/codegemma-1.1-2b",
    ),
    "7b": (
        "google/gemma-7b",
        "google/gemma-1.1-7b-it",
        "google/gemma-7b-it",
        "google/codegemma-7b",
        "google/codegemma-7b-it",
        "google/codegemma-1.1-7b-it",
    ),
}


def tiny_folder() -> Path:
    """The folder of the trained model that ships with the project: a checkpoint like any other."""
    return Path(str(resources.files("gemma_export.exporter.tiny")))


def preset(size: str) -> GemmaConfig:
    """The configuration of a size: `tiny` (as it ships), `2b` or `7b` (as they were released).

    Raises:
        UsageError: There is no such size.
    """
    if size == "tiny":
        return config_from_json(tiny_folder() / CONFIG_FILE, name="gemma-tiny")
    if size not in _RELEASED:
        raise UsageError(f"There is no size {size!r}.", f"The sizes are {', '.join(SIZES)}.")
    return _RELEASED[size]


def hub_repositories(size: str) -> tuple[str, ...]:
    """The Hugging Face repositories that hold a size, the base model first; none for `tiny`."""
    return _REPOSITORIES.get(size, ())


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
    return [
        f"{field} {getattr(config, field)} instead of {getattr(other, field)}"
        for field in _SHAPE
        if getattr(config, field) != getattr(other, field)
    ]


def config_from_json(source: str | Path | Mapping[str, Any], name: str | None = None) -> GemmaConfig:
    """Reads a Hugging Face `config.json`, as transformers 4 or transformers 5 writes it.

    Args:
        source: The file, or what it says.
        name: What to call the model; by default `gemma-SIZE`, or `gemma` when it is of no known size.

    Raises:
        CheckpointError: It cannot be read, it is not a Gemma 1, or it asks for something this family lacks.
    """
    if isinstance(source, Mapping):
        fields = gemma_fields(source, CONFIG_FILE)
    else:
        fields = gemma_fields(read_json(Path(source)), str(source))
    config = GemmaConfig(name=name or "gemma", **fields)
    size = size_of(config) if name is None else None
    return replace(config, name=f"gemma-{size}") if size else config
