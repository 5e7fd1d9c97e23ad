"""Damaged safetensors files and shards that do not fit together are refused in one sentence."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from support.checkpoints import INDEX, SHARD, refused, state_dict, write_sharded

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
