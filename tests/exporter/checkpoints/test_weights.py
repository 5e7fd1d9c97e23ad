"""Canonical weights from every kind of names, each name consumed once, and everything else refused."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.checkpoints import (
    LITTLE,
    LITTLE_2,
    google_state_dict,
    state_dict,
    write_google,
    write_sharded,
    write_single,
)

from gemma_export.errors import CheckpointError, UsageError
from gemma_export.exporter.checkpoints.checkpoint import Checkpoint, RandomCheckpoint, open_checkpoint
from gemma_export.exporter.checkpoints.weights import canonical_weights, config_for
from gemma_export.exporter.config import SIZES, GemmaConfig, preset, tiny_folder

State = dict[str, torch.Tensor]


class MemoryTensor:
    """A lazy tensor over one in memory."""

    def __init__(self, name: str, tensor: torch.Tensor) -> None:
        self.name, self.tensor = name, tensor
        self.shape, self.dtype = tuple(tensor.shape), tensor.dtype

    def read(self, start: int, stop: int) -> torch.Tensor:
        return self.tensor[start:stop].clone()


class Unread(MemoryTensor):
    """A lazy tensor of any size that must not be read."""

    def __init__(self, name: str, shape: tuple[int, ...]) -> None:
        super().__init__(name, torch.empty(shape, device="meta", dtype=torch.bfloat16))

    def read(self, start: int, stop: int) -> torch.Tensor:
        raise AssertionError(f"{self.name} was read")


def checkpoint_of(state: State, config: GemmaConfig | None = LITTLE) -> Checkpoint:
    tensors = {name: MemoryTensor(name, tensor) for name, tensor in state.items()}
    return Checkpoint(tensors, "safetensors", "here", config)


def refused(state: State, *said: str) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        canonical_weights(checkpoint_of(state), LITTLE)
    for part in said:
        assert part in caught.value.message
    assert caught.value.hint
    return caught.value


def without_prefix(state: State) -> State:
    return {name.removeprefix("model."): tensor for name, tensor in state.items()}


both_generations = pytest.mark.parametrize("config", [LITTLE, LITTLE_2], ids=["gemma", "gemma2"])


@both_generations
@pytest.mark.parametrize("rename", [dict, without_prefix, google_state_dict], ids=["hub", "bare", "google"])
def test_every_naming_gives_the_canonical_weights(
    rename: Callable[[State], State], config: GemmaConfig
) -> None:
    state = state_dict(config)
    weights = canonical_weights(checkpoint_of(rename(state)), config)
    assert list(weights) == list(config.weight_shapes)
    for name, shape in config.weight_shapes.items():
        tensor = weights[name]
        assert (tensor.shape, tensor.dtype) == (shape, torch.bfloat16)
        assert torch.equal(tensor.read(0, shape[0]), state[f"model.{name}"])
        assert torch.equal(tensor.read(3, 5), state[f"model.{name}"][3:5])


@both_generations
@pytest.mark.parametrize("write", [write_single, write_sharded, write_google])
def test_every_form_gives_the_canonical_weights(
    write: Callable[..., Path], config: GemmaConfig, tmp_path: Path
) -> None:
    state = state_dict(config)
    weights = canonical_weights(open_checkpoint(write(tmp_path, state)), config)
    assert len(weights) == len(state)
    for name, tensor in weights.items():
        assert torch.equal(tensor.read(0, tensor.shape[0]), state[f"model.{name}"])


def test_random_weights_and_what_ships_are_whole() -> None:
    sizes = [RandomCheckpoint(preset(size)) for size in ("7b", "gemma2-27b")]
    for checkpoint in (*sizes, open_checkpoint(tiny_folder())):
        config = config_for(checkpoint)
        weights = canonical_weights(checkpoint, config)
        assert {name: tensor.shape for name, tensor in weights.items()} == config.weight_shapes


def test_computed_tables_are_ignored() -> None:
    state = state_dict()
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}
    assert len(canonical_weights(checkpoint_of(state | extra), LITTLE)) == len(state)
    google = google_state_dict(state) | {"local_freqs_cis": torch.zeros(4, dtype=torch.complex64)}
    assert len(canonical_weights(checkpoint_of(google), LITTLE)) == len(state)


def test_a_missing_tensor_is_named() -> None:
    for name in ("model.layers.2.mlp.up_proj.weight", "model.norm.weight"):
        state = state_dict()
        del state[name]
        refused(state, f"has no {name}")


def test_no_embedding_table_is_said() -> None:
    refused({"norm.weight": torch.zeros(3)}, "no embedding table", "embedder.weight")


def test_what_is_left_over_is_listed_up_to_five() -> None:
    state = state_dict() | {f"model.layers.{i}.mlp.up_proj.weight": torch.zeros(40, 24) for i in range(3, 10)}
    refused(state, "model.layers.3.mlp", "model.layers.7.mlp", "and 2 more")


def test_a_misshapen_tensor_is_named_with_both_shapes() -> None:
    state = state_dict()
    state["model.layers.1.self_attn.o_proj.weight"] = torch.zeros(24, 31)
    refused(state, "model.layers.1.self_attn.o_proj.weight", "[24, 31]", "[24, 32]")
    google = google_state_dict(state_dict())
    google["model.layers.0.self_attn.qkv_proj.weight"] = torch.zeros(63, 24)
    refused(google, "qkv_proj", "[63, 24]", "[64, 24]")


def test_a_vocabulary_that_is_not_the_config_s_is_refused() -> None:
    state = state_dict()
    state["model.embed_tokens.weight"] = torch.zeros(100, 24)
    refused(state, "embed_tokens", "[100, 24]", "[96, 24]")


@pytest.mark.parametrize("dtype", [torch.int8, torch.float64, torch.float8_e4m3fn])
def test_other_dtypes_are_refused_by_tensor(dtype: torch.dtype) -> None:
    state = state_dict()
    state["model.layers.0.mlp.gate_proj.weight"] = torch.zeros(40, 24).to(dtype)
    refused(state, "model.layers.0.mlp.gate_proj.weight", str(dtype).removeprefix("torch."))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("model.layers.0.pre_feedforward_layernorm.weight", "later Gemma than 1"),
        ("model.layers.0.self_attn.q_norm.weight", "later Gemma than 2"),
        ("model.layers.0.self_attn.qkv_proj.weight_scaler", "int8"),
        ("model.layers.0.self_attn.q_proj.lora_A.weight", "LoRA"),
        ("model.layers.0.mlp.up_proj.qweight", "quantized"),
    ],
)
def test_other_kinds_of_checkpoint_are_told_by_their_names(name: str, said: str) -> None:
    refused(state_dict() | {name: torch.zeros(3)}, name, said)


@pytest.mark.parametrize("rename", [dict, google_state_dict], ids=["hub", "google"])
def test_a_generation_is_not_taken_for_the_other(rename: Callable[[State], State]) -> None:
    with pytest.raises(CheckpointError, match=r"has no model\.layers\.0\.pre_feedforward_layernorm\.weight"):
        canonical_weights(checkpoint_of(rename(state_dict(LITTLE))), LITTLE_2)
    with pytest.raises(CheckpointError, match="later Gemma than 1"):
        canonical_weights(checkpoint_of(rename(state_dict(LITTLE_2))), LITTLE)


# --- The output head


def test_a_head_that_is_the_table_is_taken_for_it() -> None:
    state = state_dict()
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    assert len(canonical_weights(checkpoint_of(state), LITTLE)) == len(state) - 1


@pytest.mark.parametrize(
    "untie",
    [lambda head: head + 1, lambda head: head[:95], lambda head: head.float()],
    ids=["values", "shape", "dtype"],
)
def test_a_head_of_its_own_is_refused(untie: Callable[[torch.Tensor], torch.Tensor]) -> None:
    state = state_dict()
    state["lm_head.weight"] = untie(state["model.embed_tokens.weight"])
    refused(state, "lm_head.weight is not")


@pytest.mark.parametrize("row", [0, 95])
def test_a_head_is_compared_to_its_ends(row: int) -> None:
    state = state_dict()
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    state["lm_head.weight"][row] += 1
    refused(state, "lm_head.weight is not")


# --- Which configuration


def shapes_only(config: GemmaConfig, read_config: GemmaConfig | None = None) -> Checkpoint:
    tensors = {
        f"model.{name}": Unread(f"model.{name}", shape) for name, shape in config.weight_shapes.items()
    }
    return Checkpoint(tensors, "safetensors", "here", read_config)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("vocab_size", [256_128, 2_048])
def test_the_size_is_found_by_shape_and_the_vocabulary_by_the_table(size: str, vocab_size: int) -> None:
    config = replace(preset(size), vocab_size=vocab_size)
    checkpoint = shapes_only(config)
    assert config_for(checkpoint) == config_for(checkpoint, size) == config
    assert len(canonical_weights(checkpoint, config)) == len(config.weight_shapes)


def test_a_ckpt_of_google_s_is_found_by_shape(tmp_path: Path) -> None:
    config = preset("tiny")
    checkpoint = open_checkpoint(write_google(tmp_path, state_dict(config, torch.float16)))
    assert config_for(checkpoint) == config
    assert len(canonical_weights(checkpoint, config)) == 47


def test_config_json_wins_and_must_be_of_the_size_asked_for() -> None:
    checkpoint = shapes_only(LITTLE, LITTLE)
    assert config_for(checkpoint) is LITTLE
    with pytest.raises(CheckpointError, match="--size 2b"):
        config_for(checkpoint, "2b")


def test_without_config_json_an_unknown_shape_is_refused() -> None:
    with pytest.raises(CheckpointError, match="tiny, tiny2, 2b, 7b") as caught:
        config_for(shapes_only(LITTLE))
    assert "config.json" in caught.value.hint


@pytest.mark.parametrize(
    ("actual", "said"),
    [
        (preset("7b"), "[256000, 3072] instead of [256000, 2048]"),
        (replace(preset("2b"), num_layers=17), "no model.layers.17."),
        (replace(preset("2b"), num_layers=19), "there is model.layers.18."),
    ],
    ids=["wider", "fewer layers", "more layers"],
)
def test_another_size_than_asked_for_is_said(actual: GemmaConfig, said: str) -> None:
    with pytest.raises(CheckpointError, match="--size 2b") as caught:
        config_for(shapes_only(actual), "2b")
    assert said in caught.value.message


def test_an_unknown_size_is_a_usage_error() -> None:
    with pytest.raises(UsageError):
        config_for(shapes_only(LITTLE), "9b")
