"""Google's .ckpt: read in place, and no code in it is run."""

import os
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from support.checkpoints import google_state_dict, read_all, refused, state_dict, write_google

from gemma_export.exporter.checkpoints.checkpoint import open_checkpoint


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
