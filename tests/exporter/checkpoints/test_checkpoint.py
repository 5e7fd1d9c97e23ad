"""Every form of checkpoint opens to the same tensors, and what is none is said in one sentence."""

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from support.checkpoints import (
    INDEX,
    LITTLE,
    assert_holds,
    google_state_dict,
    read_all,
    refused,
    state_dict,
    write_config,
    write_google,
    write_sharded,
    write_single,
)

from gemma_export.errors import CheckpointError
from gemma_export.exporter.checkpoints.checkpoint import RowSlice, open_checkpoint
from gemma_export.exporter.config import preset, tiny_folder

# --- The forms


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_every_form_gives_the_same_bits(dtype: torch.dtype, tmp_path: Path) -> None:
    state = state_dict(dtype=dtype)
    single = open_checkpoint(write_single(tmp_path / "single", state))
    sharded = open_checkpoint(write_sharded(tmp_path / "sharded", state))
    google = open_checkpoint(write_google(tmp_path / "google", state))
    assert [one.form for one in (single, sharded, google)] == [
        "safetensors",
        "sharded safetensors",
        "google ckpt",
    ]
    assert_holds(single, state)
    assert_holds(sharded, state)
    assert_holds(google, google_state_dict(state) | {"freqs_cis": torch.zeros(4, 4, dtype=torch.complex64)})
    assert single.config == sharded.config == LITTLE
    assert google.config is None


def test_blocks_of_rows_are_owned_and_what_was_asked_for(tmp_path: Path) -> None:
    state = state_dict()
    folder = write_single(tmp_path / "single", state)
    name = "model.layers.1.mlp.up_proj.weight"
    tensor = open_checkpoint(folder)[name]
    block = tensor.read(7, 19)
    assert torch.equal(block, state[name][7:19])
    assert tensor.read(5, 5).shape == (0, 24)
    block.zero_()
    assert torch.equal(tensor.read(7, 19), state[name][7:19])
    for start, stop in [(-1, 2), (3, 2), (0, 41)]:
        with pytest.raises(IndexError, match="up_proj"):
            tensor.read(start, stop)


def test_a_row_slice_is_a_tensor_of_its_own(tmp_path: Path) -> None:
    state = state_dict()
    whole = open_checkpoint(write_single(tmp_path / "single", state))["model.embed_tokens.weight"]
    part = RowSlice(whole, 10, 30)
    assert (part.name, part.shape, part.dtype) == (
        "model.embed_tokens.weight[10:30]",
        (20, 24),
        torch.bfloat16,
    )
    assert torch.equal(part.read(3, 20), state["model.embed_tokens.weight"][13:30])
    with pytest.raises(IndexError):
        part.read(3, 21)


@pytest.mark.parametrize("name", ["model.safetensors", "gemma-2b.ckpt", INDEX])
def test_a_file_is_opened_like_its_folder(name: str, tmp_path: Path) -> None:
    writers: dict[str, Callable[..., Path]] = {
        "model.safetensors": write_single,
        "gemma-2b.ckpt": write_google,
        INDEX: write_sharded,
    }
    folder = writers[name](tmp_path / "model", state_dict())
    (folder / "tokenizer.model").write_bytes(b"")
    by_file, by_folder = open_checkpoint(folder / name), open_checkpoint(str(folder))
    assert (by_file.form, by_file.config, by_file.folder) == (by_folder.form, by_folder.config, folder)
    assert by_file.tokenizer_path == by_folder.tokenizer_path == folder / "tokenizer.model"
    assert (by_file.source, by_folder.source) == (str(folder / name), str(folder))
    assert by_file.digest() == by_folder.digest()


def test_config_and_tokenizer_may_be_absent(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_single(tmp_path / "single", state_dict(), config=None))
    assert checkpoint.config is None
    assert checkpoint.tokenizer_path is None


def test_the_config_beside_a_ckpt_counts_when_it_is_hugging_face_s(tmp_path: Path) -> None:
    folder = write_google(tmp_path / "google", state_dict())
    (folder / "config.json").write_text('{"num_hidden_layers": 3}')
    assert open_checkpoint(folder).config is None
    write_config(folder)
    assert open_checkpoint(folder).config == LITTLE


def test_another_size_than_asked_for_is_refused(tmp_path: Path) -> None:
    folder = write_single(tmp_path / "single", state_dict())
    with pytest.raises(CheckpointError, match="--size 2b"):
        open_checkpoint(folder, size="2b")


def test_what_ships_opens() -> None:
    checkpoint = open_checkpoint(tiny_folder(), size="tiny")
    assert checkpoint.tokenizer_path is not None
    assert checkpoint.config == preset("tiny")


def test_what_transformers_saves_opens(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.GemmaForCausalLM(
        transformers.GemmaConfig(
            vocab_size=LITTLE.vocab_size,
            hidden_size=LITTLE.hidden_size,
            num_hidden_layers=LITTLE.num_layers,
            num_attention_heads=LITTLE.num_query_heads,
            num_key_value_heads=LITTLE.num_kv_heads,
            head_dim=LITTLE.head_dim,
            intermediate_size=LITTLE.intermediate_size,
            max_position_embeddings=LITTLE.context_length,
        )
    ).to(torch.bfloat16)
    state = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    model.save_pretrained(tmp_path / "single")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="10KB")
    single, sharded = open_checkpoint(tmp_path / "single"), open_checkpoint(tmp_path / "sharded")
    assert (single.form, sharded.form) == ("safetensors", "sharded safetensors")
    assert single.config == sharded.config == LITTLE
    assert_holds(single, state)
    assert_holds(sharded, state)


# --- The digest


def test_the_digest_is_of_the_weights_not_of_the_files(tmp_path: Path) -> None:
    state = state_dict()
    single = open_checkpoint(write_single(tmp_path / "single", state)).digest()
    assert single == open_checkpoint(write_sharded(tmp_path / "sharded", state)).digest()
    state["model.norm.weight"][5] += 1
    assert single != open_checkpoint(write_single(tmp_path / "changed", state)).digest()


def test_the_digest_tells_dtype_and_name(tmp_path: Path) -> None:
    def digest(name: str, tensor: torch.Tensor) -> str:
        return open_checkpoint(write_single(tmp_path / "one", {name: tensor}, config=None)).digest()

    zeros = torch.zeros(4, 4, dtype=torch.float16)
    digests = {
        digest("a", zeros),
        digest("b", zeros),
        digest("a", zeros.bfloat16()),
        digest("a", zeros.view(2, 8)),
    }
    assert len(digests) == 4


@pytest.mark.parametrize("row", [0, 2500, 4999])
def test_the_digest_samples_both_ends_and_the_middle_of_what_is_large(row: int, tmp_path: Path) -> None:
    tensor = torch.zeros(5000, 256)
    before = open_checkpoint(write_single(tmp_path / "a", {"t": tensor}, config=None)).digest()
    tensor[row, 0] = 1
    assert open_checkpoint(write_single(tmp_path / "b", {"t": tensor}, config=None)).digest() != before


# --- What cannot be opened


def test_no_such_path_is_said(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "There is no checkpoint")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    refused(tmp_path / "link", "is a link to a file that is not there")


def test_a_folder_of_something_else_is_said(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("")
    refused(tmp_path, "holds no checkpoint")
    refused(tmp_path / "README.md", "is not a checkpoint")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("gemma-2b.gguf", "llama.cpp"),
        ("pytorch_model.bin", "pickle"),
        ("model.pth", "pickle"),
        ("model.weights.h5", "Keras"),
        ("flax_model.msgpack", "Flax"),
        ("gemma.task", "LiteRT"),
        ("_METADATA", "JAX"),
    ],
)
def test_other_forms_are_refused_by_name(name: str, said: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"x")
    refused(tmp_path, said)
    error = refused(tmp_path / name, said)
    assert "onvert" in error.hint or "safetensors" in error.hint


def test_other_families_are_refused_before_their_weights_are_looked_at(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    write_config(tmp_path, model_type="gemma2")
    refused(tmp_path, "'gemma2'")


def test_several_ckpt_files_must_be_told_apart(tmp_path: Path) -> None:
    write_google(tmp_path, state_dict(), "a.ckpt")
    write_google(tmp_path, state_dict(), "b.ckpt")
    refused(tmp_path, "2 .ckpt files: a.ckpt, b.ckpt")
    assert open_checkpoint(tmp_path / "b.ckpt").form == "google ckpt"


def test_a_safetensors_file_of_another_name_must_be_given_itself(tmp_path: Path) -> None:
    write_single(tmp_path, state_dict()).joinpath("model.safetensors").rename(tmp_path / "mine.safetensors")
    refused(tmp_path, "mine.safetensors")
    assert open_checkpoint(tmp_path / "mine.safetensors").config == LITTLE


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
@pytest.mark.parametrize("form", ["safetensors", "ckpt"])
def test_a_file_cut_anywhere_or_with_a_wrong_byte_is_never_a_traceback(
    form: str, data: st.DataObject, tmp_path: Path
) -> None:
    small = {"a": torch.arange(12.0).view(3, 4), "b": torch.ones(5, dtype=torch.bfloat16)}
    path = tmp_path / f"model.{form}"
    if form == "ckpt":
        torch.save({"model_state_dict": small}, path)
    else:
        save_file(small, path)
    content = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    cut = data.draw(st.booleans())
    if cut:
        del content[place:]
    else:
        content[place] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    with pytest.raises(CheckpointError) if cut else contextlib.suppress(CheckpointError):
        for tensor in open_checkpoint(path).values():
            tensor.read(0, tensor.shape[0] if tensor.shape else 1)


@pytest.mark.parametrize("form", ["safetensors", "ckpt"])
def test_a_file_that_changes_while_it_is_read_is_refused(form: str, tmp_path: Path) -> None:
    write = write_single if form == "safetensors" else write_google
    checkpoint = open_checkpoint(write(tmp_path, state_dict()))
    tensor = checkpoint["model.norm.weight"]
    path = next(tmp_path.glob(f"*.{form}"))
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(CheckpointError, match="changed while it was being read"):
        read_all(tensor)
    path.unlink()
    with pytest.raises(CheckpointError, match="There is no"):
        read_all(tensor)
