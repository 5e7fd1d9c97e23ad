"""What is wrong with a checkpoint is said in one sentence and a hint, and leaves no half bundle."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.checkpoints import LITTLE, state_dict, write_config, write_google, write_sharded, write_single
from support.command_line import Invoke, assert_refused
from support.damage import Damage, change_json, change_weights, cut, flip_byte, remove
from support.folders import only

from gemma_export.exporter.config import tiny_folder

SMALL = replace(LITTLE, vocab_size=2048)
"""A shape whose vocabulary is the shipped tokenizer's."""

EMBEDDING = "model.embed_tokens.weight"
DOWN = "model.layers.1.mlp.down_proj.weight"
NORM = "model.layers.0.input_layernorm.weight"


@pytest.fixture
def small_checkpoint(tmp_path: Path) -> Path:
    """A checkpoint of a few kilobytes, to be damaged."""
    folder = write_single(tmp_path / "checkpoint", state_dict(SMALL), SMALL)
    shutil.copyfile(tiny_folder() / "tokenizer.model", folder / "tokenizer.model")
    return folder


def rename(old: str, new: str) -> Damage:
    return lambda folder: change_weights(folder, lambda state: state.update({new: state.pop(old)}))


def set_weight(name: str, make: Callable[[torch.Tensor], torch.Tensor]) -> Damage:
    return lambda folder: change_weights(folder, lambda state: state.update({name: make(state[name])}))


def set_config(**values: object) -> Damage:
    return lambda folder: change_json(folder / "config.json", lambda config: config.update(values))


def write(name: str, data: bytes) -> Damage:
    return lambda folder: (folder / name).write_bytes(data)


CHECKPOINTS: dict[str, tuple[Damage, str]] = {
    "weights cut short": (lambda folder: cut(folder / "model.safetensors", 100), "is cut short"),
    "header cut short": (lambda folder: os.truncate(folder / "model.safetensors", 100), "is cut short"),
    "empty file": (write("model.safetensors", b""), "is cut short"),
    "header damaged": (lambda folder: flip_byte(folder / "model.safetensors", 8), "is damaged"),
    "not safetensors": (write("model.safetensors", b"<html>" * 100), "is damaged"),
    "no weights": (remove("model.safetensors"), "holds no checkpoint"),
    "tensor missing": (lambda folder: change_weights(folder, lambda state: state.pop(DOWN)), f"no {DOWN}"),
    "tensor extra": (
        lambda folder: change_weights(folder, lambda state: state.update(extra=torch.zeros(2))),
        "holds what no such Gemma has: extra",
    ),
    "tensor misshapen": (set_weight(DOWN, lambda weight: weight[:-1].clone()), f"{DOWN} has the shape"),
    "tensor renamed": (rename(NORM, "model.layers.0.norm1.weight"), f"no {NORM}"),
    "tensor of integers": (set_weight(DOWN, lambda weight: weight.to(torch.int8)), "is int8"),
    "Llama": (set_config(model_type="llama", architectures=["LlamaForCausalLM"]), "only Gemma 1"),
    "Gemma 2": (
        set_config(model_type="gemma2", architectures=["Gemma2ForCausalLM"]),
        "does not give sliding_window",
    ),
    "extended context": (set_config(rope_scaling={"rope_type": "yarn"}), "rotary embeddings"),
    "quantized": (set_config(quantization_config={"quant_method": "gptq"}), "quantization_config"),
    "impossible head": (set_config(head_dim=7), "head_dim = 7"),
    "config damaged": (write("config.json", b'{"model_type": '), "is not JSON"),
    "config of another": (set_config(intermediate_size=48), "has the shape"),
    "no tokenizer": (remove("tokenizer.model"), "no tokenizer.model"),
    "tokenizer damaged": (write("tokenizer.model", b"no tokenizer"), "tokenizer.model"),
    "tokenizer empty": (write("tokenizer.model", b""), "tokenizer.model"),
}


@pytest.mark.parametrize(("damage", "words"), CHECKPOINTS.values(), ids=CHECKPOINTS)
def test_bad_checkpoint(
    damage: Damage, words: str, small_checkpoint: Path, tmp_path: Path, invoke: Invoke
) -> None:
    damage(small_checkpoint)
    assert_refused(invoke(["build", "--checkpoint", small_checkpoint, "-o", tmp_path / "b", "-q"]), 1, words)
    only(tmp_path, "checkpoint")


def test_tokenizer_of_another_size(tmp_path: Path, invoke: Invoke) -> None:
    config = replace(SMALL, vocab_size=2050)
    folder = write_single(tmp_path / "checkpoint", state_dict(config), config)
    shutil.copyfile(tiny_folder() / "tokenizer.model", folder / "tokenizer.model")
    outcome = invoke(["build", "--checkpoint", folder, "-o", tmp_path / "b", "-q"])
    assert_refused(outcome, 1, "2048 pieces", "2050 rows")
    only(tmp_path, "checkpoint")


def test_missing_shard(tmp_path: Path, invoke: Invoke) -> None:
    folder = write_sharded(tmp_path / "checkpoint", state_dict(SMALL), SMALL)
    (folder / "model-00002-of-00003.safetensors").unlink()
    outcome = invoke(["build", "--checkpoint", folder, "-o", tmp_path / "b", "-q"])
    assert_refused(outcome, 1, "model-00002-of-00003.safetensors is missing")


def test_damaged_pickle(tmp_path: Path, invoke: Invoke) -> None:
    folder = write_google(tmp_path / "checkpoint", state_dict(SMALL))
    write_config(folder, SMALL)
    cut(folder / "gemma-2b.ckpt", 1000)
    assert_refused(invoke(["build", "--checkpoint", folder, "-o", tmp_path / "b", "-q"]), 1, "gemma-2b.ckpt")


@pytest.mark.parametrize(
    ("path", "words"),
    [("nowhere", "There is no checkpoint"), ("file.gguf", "llama.cpp"), ("file.txt", "not a checkpoint")],
)
def test_no_checkpoint(path: str, words: str, tmp_path: Path, invoke: Invoke) -> None:
    (tmp_path / "file.gguf").write_bytes(b"GGUF")
    (tmp_path / "file.txt").write_bytes(b"text")
    outcome = invoke(["build", "--checkpoint", tmp_path / path, "-o", tmp_path / "b"])
    assert_refused(outcome, 1, words)


def test_no_released_checkpoint(tmp_path: Path, invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    outcome = invoke(["build", "--size", "2b", "-o", tmp_path / "b"])
    assert_refused(outcome, 1, "No Gemma of size 2b")
    assert "--random-weights" in outcome.err


def poke(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def make(weight: torch.Tensor) -> torch.Tensor:
        weight.view(-1)[weight.numel() // 2] = value
        return weight

    return make


@pytest.mark.usefixtures("traced_once")
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("name", [EMBEDDING, DOWN, NORM], ids=["embedding", "projection", "norm"])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")], ids=["nan", "inf"])
def test_weight_that_is_no_number(
    value: float, name: str, precision: str, tiny_checkpoint: Path, tmp_path: Path, invoke: Invoke
) -> None:
    set_weight(name, poke(value))(tiny_checkpoint)
    common = ["build", "--checkpoint", tiny_checkpoint, "--precision", precision, "--parity", "none"]
    assert_refused(invoke([*common, "-q", "-o", tmp_path / "b"]), 1, name, "holds NaN or infinity")
    only(tmp_path, "checkpoint")


@pytest.mark.slow
@pytest.mark.usefixtures("traced_once")
def test_weight_beyond_fp16_is_kept_in_fp32(tiny_checkpoint: Path, tmp_path: Path, invoke: Invoke) -> None:
    set_weight(DOWN, poke(70000.0))(tiny_checkpoint)
    output = tmp_path / "b"
    outcome = invoke(
        ["build", "--checkpoint", tiny_checkpoint, "--precision", "fp16", "-o", output, "--json"]
    )
    assert outcome.code == 0, outcome.err
    notes = [event["text"] for event in outcome.events if event["event"] == "note"]
    assert len(notes) == 1
    assert "layers.1.mlp.down_proj.weight" in notes[0]
    manifest = json.loads((output / "manifest.json").read_text())
    assert manifest["fp32_tensors"] == ["layers.1.mlp.down_proj.weight"]
    assert manifest["parity"]["verdict"] == "pass"
    assert invoke(["verify", output]).code == 0


@pytest.mark.parametrize(
    ("checkpoint", "words"),
    [("nowhere", "There is no checkpoint"), ("checkpoint", "different models")],
    ids=["missing", "another"],
)
def test_parity_against_a_bad_checkpoint(
    checkpoint: str, words: str, small_checkpoint: Path, tmp_path: Path, tiny_bundle: Path, invoke: Invoke
) -> None:
    outcome = invoke(["parity", tiny_bundle, "--checkpoint", tmp_path / checkpoint, "--json"])
    assert outcome.code == 1
    assert words in outcome.err
