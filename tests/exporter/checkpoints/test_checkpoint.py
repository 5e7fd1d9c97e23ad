"""Every form of checkpoint opens to the same tensors, and every kind of damage is said in one sentence."""

import contextlib
import json
import os
import pickle
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from support.checkpoints import (
    LITTLE,
    google_state_dict,
    state_dict,
    write_config,
    write_google,
    write_hub_cache,
    write_sharded,
    write_single,
)

from gemma_export.errors import CheckpointError
from gemma_export.exporter.checkpoints.checkpoint import (
    Checkpoint,
    LazyTensor,
    RandomCheckpoint,
    RowSlice,
    find_in_hub_cache,
    open_checkpoint,
)
from gemma_export.exporter.config import GemmaConfig, preset, tiny_folder

INDEX = "model.safetensors.index.json"
SHARD = "model-00002-of-00003.safetensors"


def read_all(tensor: LazyTensor) -> torch.Tensor:
    return tensor.read(0, tensor.shape[0])


def assert_holds(checkpoint: Mapping[str, LazyTensor], state: Mapping[str, torch.Tensor]) -> None:
    assert set(checkpoint) == set(state)
    for name, expected in state.items():
        tensor = checkpoint[name]
        assert (tensor.name, tensor.shape, tensor.dtype) == (name, tuple(expected.shape), expected.dtype)
        assert torch.equal(read_all(tensor), expected)


def refused(path: Path, said: str) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    assert said in caught.value.message
    assert caught.value.hint
    return caught.value


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


# --- The Hugging Face cache


@pytest.mark.parametrize("write", [write_single, write_sharded])
def test_a_snapshot_of_links_opens(write: Callable[..., Path], tmp_path: Path) -> None:
    state = state_dict()
    snapshot = write_hub_cache(tmp_path / "hub", "google/gemma-2b", write(tmp_path / "model", state))
    assert_holds(open_checkpoint(snapshot), state)
    repository = open_checkpoint(tmp_path / "hub" / "models--google--gemma-2b")
    assert repository.folder == snapshot
    assert repository.source == str(snapshot)


def test_a_link_to_nothing_is_said(tmp_path: Path) -> None:
    folder = write_single(tmp_path / "model", state_dict())
    snapshot = write_hub_cache(tmp_path / "hub", "google/gemma-2b", folder)
    os.remove((snapshot / "model.safetensors").resolve())
    refused(snapshot, "model.safetensors is a link to a file that is not there")
    refused(snapshot / "model.safetensors", "is a link to a file that is not there")
    os.remove((snapshot / "config.json").resolve())
    refused(snapshot, "config.json")


@pytest.fixture
def no_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("variable", "value", "cache"),
    [
        ("HF_HUB_CACHE", "{home}/one", "one"),
        ("HUGGINGFACE_HUB_CACHE", "~/two", "two"),
        ("HF_HOME", "$HOME/three", "three/hub"),
        ("XDG_CACHE_HOME", "{home}/four", "four/huggingface/hub"),
        ("UNRELATED", "", ".cache/huggingface/hub"),
    ],
)
def test_the_cache_is_where_huggingface_hub_has_it(
    variable: str, value: str, cache: str, no_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value.format(home=no_cache))
    folder = write_single(no_cache / "model", state_dict())
    snapshot = write_hub_cache(no_cache / cache, "google/gemma-1.1-2b-it", folder)
    assert find_in_hub_cache("2b") == snapshot


def test_the_base_model_is_preferred_and_what_is_incomplete_is_passed_over(no_cache: Path) -> None:
    hub = no_cache / ".cache" / "huggingface" / "hub"
    chat = write_hub_cache(hub, "google/gemma-2b-it", write_sharded(no_cache / "a", state_dict()))
    base = write_hub_cache(hub, "google/gemma-2b", write_single(no_cache / "b", state_dict()))
    assert find_in_hub_cache("2b") == base
    (base / "model.safetensors").unlink()
    assert find_in_hub_cache("2b") == chat


def test_without_refs_the_only_snapshot_is_taken(no_cache: Path) -> None:
    hub = no_cache / ".cache" / "huggingface" / "hub"
    snapshot = write_hub_cache(hub, "google/gemma-7b", write_single(no_cache / "a", state_dict()))
    (hub / "models--google--gemma-7b" / "refs" / "main").unlink()
    assert find_in_hub_cache("7b") == snapshot
    (snapshot.parent / "another").mkdir()
    with pytest.raises(CheckpointError):
        find_in_hub_cache("7b")


def test_an_empty_cache_says_how_to_fill_it(no_cache: Path) -> None:
    with pytest.raises(CheckpointError, match=r"No Gemma of size 7b.*huggingface/hub") as caught:
        find_in_hub_cache("7b")
    for way in (
        "licence",
        "huggingface.co/google/gemma-7b",
        "hf download",
        "--checkpoint",
        "--random-weights",
    ):
        assert way in caught.value.hint


def test_an_interrupted_download_is_said(no_cache: Path) -> None:
    hub = no_cache / ".cache" / "huggingface" / "hub"
    snapshot = write_hub_cache(hub, "google/gemma-2b", write_single(no_cache / "a", state_dict()))
    (snapshot / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="google/gemma-2b is there, but without"):
        find_in_hub_cache("2b")


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


# --- Damaged safetensors


def safetensors_bytes(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(dtype: str = "F16", shape: object = (2, 2), offsets: object = (0, 8)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "cut short"),
        (b"\x01\x00", "cut short"),
        ((10**6).to_bytes(8, "little") + b"{}", "header alone"),
        ((2**63).to_bytes(8, "little"), "its header would take"),
        (safetensors_bytes(b"{]"), "not JSON"),
        (safetensors_bytes(b"[" * 100_000), "not JSON"),
        (safetensors_bytes([1]), "not a JSON object"),
        (safetensors_bytes({"t": 5}), "does not describe t"),
        (safetensors_bytes({"t": {"dtype": "F16"}}), "does not describe t"),
        (safetensors_bytes({"t": entry(shape=[2, -2])}, bytes(8)), "does not describe t"),
        (safetensors_bytes({"t": entry(shape=[2, True])}, bytes(8)), "does not describe t"),
        (safetensors_bytes({"t": entry(shape=[2**40, 2**40])}, bytes(8)), "does not describe t"),
        (safetensors_bytes({"t": entry(offsets=[0, 8, 9])}, bytes(8)), "does not describe t"),
        (safetensors_bytes({"t": entry(offsets=[8, 0])}, bytes(8)), "the place it gives for t"),
        (safetensors_bytes({"t": entry(offsets=[0, 6])}, bytes(6)), "the place it gives for t"),
        (safetensors_bytes({"t": entry(offsets=[2, 10])}, bytes(10)), "the place it gives for t"),
        (
            safetensors_bytes({"t": entry(), "u": entry(offsets=[4, 12])}, bytes(12)),
            "the place it gives for u",
        ),
        (safetensors_bytes({"t": entry()}, bytes(7)), "cut short"),
        (safetensors_bytes({"t": entry()}, bytes(9)), "1 bytes at its end"),
        (safetensors_bytes({"t": entry("F4", (2, 2), (0, 2))}, bytes(2)), "t in"),
    ],
)
def test_damaged_safetensors_are_refused(content: bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    error = refused(path, said)
    assert str(path) in error.message


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


# --- Shards


def change_index(folder: Path, change: Callable[[dict[str, str]], object]) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    (write_sharded(tmp_path, state_dict()) / SHARD).unlink()
    refused(tmp_path, f"The shard {SHARD} is missing")


def test_a_shard_that_links_to_nothing_is_named(tmp_path: Path) -> None:
    path = write_sharded(tmp_path, state_dict()) / SHARD
    path.unlink()
    path.symlink_to(tmp_path / "nowhere")
    refused(tmp_path, f"{SHARD} is a link")


def test_a_shard_alone_is_not_a_checkpoint(tmp_path: Path) -> None:
    write_sharded(tmp_path, state_dict())
    error = refused(tmp_path / SHARD, "one of 3 shards")
    assert str(tmp_path) in error.hint
    (tmp_path / INDEX).unlink()
    refused(tmp_path, f"no {INDEX}")


def test_an_index_and_its_shards_must_agree(tmp_path: Path) -> None:
    write_sharded(tmp_path, state_dict())
    change_index(tmp_path, lambda weights: weights.update({"model.extra.weight": SHARD}))
    refused(tmp_path, f"{SHARD} holds model.extra.weight, which it does not")
    change_index(
        tmp_path, lambda weights: (weights.pop("model.extra.weight"), weights.pop("model.norm.weight"))
    )
    refused(tmp_path, "holds model.norm.weight")


@pytest.mark.parametrize(
    "shard", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", "model.bin", 5]
)
def test_an_index_cannot_lead_out_of_its_folder(shard: object, tmp_path: Path) -> None:
    write_sharded(tmp_path, state_dict())
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": shard}}))
    refused(tmp_path, "no file beside it")


@pytest.mark.parametrize("index", ["{}", '{"weight_map": {}}', '{"weight_map": []}', "[]", "{"])
def test_an_index_of_nothing_is_refused(index: str, tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text(index)
    refused(tmp_path, INDEX)


# --- Google's .ckpt


class Harmful:
    def __reduce__(self) -> tuple[object, ...]:
        return (os.system, ("echo harm",))


def test_a_pickle_with_code_in_it_is_refused_and_does_not_run(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "model.ckpt"
    torch.save({"model_state_dict": {"t": torch.zeros(2)}, "more": Harmful()}, path)
    error = refused(path, "more than weights")
    assert "convert" in error.hint
    assert "harm" not in capfd.readouterr().out


def test_the_old_format_says_how_to_save_it_again(tmp_path: Path) -> None:
    path = tmp_path / "model.ckpt"
    torch.save({"model_state_dict": state_dict()}, path, _use_new_zipfile_serialization=False)
    error = refused(path, "before 1.6")
    assert "torch.save" in error.hint


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04 but no zip", b"\x80\x04."])
def test_what_is_no_torch_file_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.ckpt"
    path.write_bytes(content)
    refused(path, "model.ckpt is")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (torch.zeros(3), "not a dict"),
        ([1, 2], "not a dict"),
        ({"state_dict": {}}, "not a dict with 'model_state_dict'"),
        ({"model_state_dict": torch.zeros(3)}, "not a dict with 'model_state_dict'"),
        ({"model_state_dict": {"step": 5}}, "'step'"),
        ({"model_state_dict": {7: torch.zeros(3)}}, "7 in its"),
        ({"model_state_dict": {"t": torch.zeros(3, 4).t()}}, "t in"),
    ],
)
def test_another_content_is_refused(content: object, said: str, tmp_path: Path) -> None:
    path = tmp_path / "model.ckpt"
    torch.save(content, path)
    refused(path, said)


def test_views_of_one_storage_are_read_where_they_are(tmp_path: Path) -> None:
    whole = torch.arange(24.0).view(6, 4)
    torch.save(
        {"model_state_dict": {"a": whole, "b": whole[2:5], "c": torch.nn.Parameter(whole)}},
        tmp_path / "m.ckpt",
    )
    checkpoint = open_checkpoint(tmp_path)
    assert torch.equal(read_all(checkpoint["b"]), whole[2:5])
    assert torch.equal(read_all(checkpoint["c"]), whole)


def repack(
    path: Path, replaced: Mapping[str, bytes | None] | None = None, compression: int = zipfile.ZIP_STORED
) -> None:
    """Packs a zip anew, with other content for the records of these names; None leaves one out."""
    with zipfile.ZipFile(path) as archive:
        records = {record.filename: archive.read(record) for record in archive.infolist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, old in records.items():
            content = (replaced or {}).get(name.rpartition("/")[2].lstrip("."), old)
            if content is not None:
                archive.writestr(name, content)


def test_what_older_releases_of_torch_saved_is_read(tmp_path: Path) -> None:
    state = state_dict()
    path = write_google(tmp_path, state) / "gemma-2b.ckpt"
    # Before 2.7 the zip did not say how it was laid out, and its tensors could lie anywhere.
    repack(path, {"format_version": None, "storage_alignment": None})
    checkpoint = open_checkpoint(path)
    for name, expected in google_state_dict(state).items():
        assert torch.equal(read_all(checkpoint[name]), expected)


def test_a_zip_packed_by_another_hand_is_refused(tmp_path: Path) -> None:
    path = write_google(tmp_path, state_dict()) / "gemma-2b.ckpt"
    repack(path)
    error = refused(path, "cannot be read in place")
    assert "torch.save" in error.hint
    repack(path, compression=zipfile.ZIP_DEFLATED)
    refused(path, "compressed")


def test_big_endian_bytes_are_refused(tmp_path: Path) -> None:
    path = write_google(tmp_path, state_dict()) / "gemma-2b.ckpt"
    repack(path, {"byteorder": b"big"})
    refused(path, "big-endian")


def test_a_storage_shorter_than_the_pickle_says_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.ckpt"
    torch.save({"model_state_dict": {"t": torch.zeros(64)}}, path)
    repack(path, {"0": bytes(16)})
    refused(path, "model.ckpt")


def test_a_plain_pickle_is_not_loaded(tmp_path: Path) -> None:
    path = tmp_path / "model.ckpt"
    path.write_bytes(pickle.dumps({"model_state_dict": Harmful()}, protocol=2))
    refused(path, "cannot be read in place")


# --- Random weights


@pytest.fixture(scope="module")
def wide() -> GemmaConfig:
    """Wide enough that a tensor has several blocks, one of them not full."""
    return GemmaConfig("wide", 500, 256, 1, 4, 1, 32, 1100, 64)


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_random_values_do_not_depend_on_the_split(data: st.DataObject, wide: GemmaConfig) -> None:
    tensor = RandomCheckpoint(wide, seed=3)["model.layers.0.mlp.up_proj.weight"]
    cuts = sorted(data.draw(st.lists(st.integers(0, 1100), max_size=4)))
    parts = [tensor.read(start, stop) for start, stop in zip([0, *cuts], [*cuts, 1100], strict=True)]
    assert torch.equal(torch.cat(parts), tensor.read(0, 1100))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_random_values_are_spread_as_weights_are(dtype: torch.dtype, wide: GemmaConfig) -> None:
    checkpoint = RandomCheckpoint(wide, seed=0, dtype=dtype)
    assert checkpoint.form == "random"
    assert checkpoint.config == wide
    for name, tensor in checkpoint.items():
        values = read_all(tensor)
        assert values.dtype == tensor.dtype == dtype
        assert tuple(values.shape) == tensor.shape
        assert values.isfinite().all()
        if name.endswith("proj.weight"):
            assert values.float().std().item() == pytest.approx(tensor.shape[1] ** -0.5, rel=0.02)
            assert abs(values.float().mean().item()) < 0.1 * tensor.shape[1] ** -0.5


def test_random_values_are_the_seed_s_and_each_tensor_s_own(wide: GemmaConfig) -> None:
    def values(seed: int, name: str) -> torch.Tensor:
        return RandomCheckpoint(wide, seed, torch.float32)[f"model.layers.0.mlp.{name}.weight"].read(0, 4)

    assert torch.equal(values(1, "up_proj"), values(1, "up_proj"))
    assert not torch.equal(values(1, "up_proj"), values(2, "up_proj"))
    assert not torch.equal(values(1, "up_proj"), values(1, "gate_proj"))
    # The values themselves, so that a seed means the same in every version and on every machine.
    pinned = [0.047886040061712265, 0.038074273616075516, 0.0835585817694664]
    assert values(1, "up_proj")[0, :3].tolist() == pinned


def test_the_digest_of_random_weights_is_of_what_makes_them(wide: GemmaConfig) -> None:
    def digest(config: GemmaConfig = wide, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> str:
        return RandomCheckpoint(config, seed, dtype).digest()

    assert digest() == digest()
    assert len({digest(), digest(seed=1), digest(dtype=torch.float16), digest(preset("2b"))}) == 4


def test_random_weights_are_a_checkpoint(wide: GemmaConfig) -> None:
    checkpoint: Checkpoint = RandomCheckpoint(wide)
    assert checkpoint.folder is checkpoint.tokenizer_path is None
    assert len(checkpoint) == 11
