"""Checkpoints in the cache of huggingface_hub: found without a network, and links that lead nowhere."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from support.checkpoints import (
    assert_holds,
    refused,
    state_dict,
    write_hub_cache,
    write_sharded,
    write_single,
)

from gemma_export.errors import CheckpointError
from gemma_export.exporter.checkpoints.checkpoint import find_in_hub_cache, open_checkpoint


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
