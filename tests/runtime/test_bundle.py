import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.small_bundle import Shape, manifest, write_manifest

from gemma_export.errors import BundleError, UsageError
from gemma_export.runtime.bundle import MANIFEST_NAME, Manifest, hash_file, open_bundle


@pytest.fixture
def bundle(small_bundle: Path, tmp_path: Path) -> Path:
    """A copy to tamper with."""
    return Path(shutil.copytree(small_bundle, tmp_path / "bundle"))


def edit(bundle: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = bundle / MANIFEST_NAME
    contents = json.loads(path.read_text())
    change(contents)
    path.write_text(json.dumps(contents))


def refusal(path: Path, check: Any = "full") -> str:
    with pytest.raises(BundleError) as caught:
        open_bundle(path, check)
    assert caught.value.hint
    return caught.value.message


def test_opens_a_good_bundle(small_bundle: Path) -> None:
    opened = open_bundle(small_bundle)
    assert opened.manifest.model.num_kv_heads == 2
    assert opened.manifest.tokens.stop == (1, 107)
    assert opened.file("model.onnx") == small_bundle / "model.onnx"
    assert opened.extra == ()


def test_manifest_survives_a_round_trip(small_bundle: Path) -> None:
    read = Manifest.from_json((small_bundle / MANIFEST_NAME).read_text())
    assert Manifest.from_json(read.to_json()) == read


def test_parity_figures_stand_beside_the_verdict(bundle: Path) -> None:
    edit(bundle, lambda m: m["parity"].update(mean_kl=1e-7))
    read = Manifest.from_json((bundle / MANIFEST_NAME).read_text())
    assert read.parity.figures == {"mean_kl": 1e-7}
    assert json.loads(read.to_json())["parity"]["mean_kl"] == 1e-7
    assert Manifest.from_json(read.to_json()) == read


def test_keys_of_a_later_release_are_ignored(bundle: Path) -> None:
    edit(bundle, lambda m: m.update(invented_later=1))
    open_bundle(bundle)


def test_extra_files_are_told_not_refused(bundle: Path) -> None:
    (bundle / "notes").mkdir()
    (bundle / "notes" / "mine.txt").write_text("")
    assert open_bundle(bundle).extra == ("notes/mine.txt",)


def test_bundle_behind_a_link_opens(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(bundle)
    assert open_bundle(tmp_path / "link").path == bundle


def test_not_there(tmp_path: Path) -> None:
    assert "not there" in refusal(tmp_path / "nowhere")


def test_a_file_is_not_a_bundle(bundle: Path) -> None:
    assert "not a folder" in refusal(bundle / "model.onnx")


def test_a_folder_without_manifest_is_not_a_bundle(bundle: Path) -> None:
    (bundle / MANIFEST_NAME).unlink()
    assert "not a bundle" in refusal(bundle)


@pytest.mark.parametrize("check", ["full", "quick"])
def test_changed_byte(bundle: Path, check: str) -> None:
    data = bytearray((bundle / "model.onnx.data").read_bytes())
    data[100] ^= 1
    (bundle / "model.onnx.data").write_bytes(data)
    assert "model.onnx.data has been changed" in refusal(bundle, check)


def test_sizes_do_not_see_a_changed_byte(bundle: Path) -> None:
    (bundle / "tokenizer.model").write_bytes(bytes((bundle / "tokenizer.model").stat().st_size))
    open_bundle(bundle, "sizes")


def test_quick_looks_only_at_the_size_of_a_large_file(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gemma_export.runtime.bundle.LARGE_FILE", 100_000)
    size = (bundle / "model.onnx.data").stat().st_size
    assert size > 100_000
    (bundle / "model.onnx.data").write_bytes(bytes(size))
    open_bundle(bundle, "quick")
    assert "changed" in refusal(bundle, "full")


@pytest.mark.parametrize("check", ["full", "quick", "sizes"])
def test_cut_short(bundle: Path, check: str) -> None:
    with (bundle / "model.onnx.data").open("r+b") as file:
        file.truncate(1000)
    assert "model.onnx.data has 1000 bytes" in refusal(bundle, check)


def test_missing_file(bundle: Path) -> None:
    (bundle / "model.onnx.data").unlink()
    assert "model.onnx.data is missing" in refusal(bundle)


@pytest.mark.parametrize("name", ["model.onnx", "tokenizer.model"])
def test_file_that_every_bundle_needs_is_not_listed(bundle: Path, name: str) -> None:
    edit(bundle, lambda m: m["files"].pop(name))
    assert f"lists no {name}" in refusal(bundle)


@pytest.mark.parametrize(
    "name",
    [
        "../secret",
        "a/../../secret",
        "/etc/passwd",
        "..",
        "",
        ".",
        "./model.onnx",
        "a//b",
        "a/",
        "C:secret",
        "a\\..\\secret",
        "nul\0",
        MANIFEST_NAME,
    ],
    ids=repr,
)
def test_path_that_is_none_of_the_bundle(bundle: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "secret").write_text("x")
    entry = {"size": 1, "sha256": hash_file(tmp_path / "secret")}
    edit(bundle, lambda m: m["files"].update({name: entry}))
    assert "no path inside the bundle" in refusal(bundle)


def test_link_out_of_the_bundle(bundle: Path, tmp_path: Path) -> None:
    (bundle / "tokenizer.model").rename(tmp_path / "elsewhere")
    (bundle / "tokenizer.model").symlink_to(tmp_path / "elsewhere")
    assert "is a link" in refusal(bundle)


def test_folder_that_is_a_link_out(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "file").write_text("x")
    (bundle / "inside").symlink_to(tmp_path / "elsewhere")
    entry = {"size": 1, "sha256": hash_file(tmp_path / "elsewhere" / "file")}
    edit(bundle, lambda m: m["files"].update({"inside/file": entry}))
    assert "is a link" in refusal(bundle)


def test_manifest_that_is_a_link(bundle: Path, tmp_path: Path) -> None:
    (bundle / MANIFEST_NAME).rename(tmp_path / "manifest")
    (bundle / MANIFEST_NAME).symlink_to(tmp_path / "manifest")
    assert "is a link" in refusal(bundle)


def test_folder_in_place_of_a_file(bundle: Path) -> None:
    (bundle / "tokenizer.model").unlink()
    (bundle / "tokenizer.model").mkdir()
    assert "is not a file" in refusal(bundle)


def test_newer_format(bundle: Path) -> None:
    edit(bundle, lambda m: m.update(format_version=7))
    message = refusal(bundle)
    assert "7" in message
    assert "up to 1" in message


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "null", "[]", '"text"', "{}", "\ufeff{}"])
def test_manifest_that_is_none(bundle: Path, text: str) -> None:
    (bundle / MANIFEST_NAME).write_text(text)
    assert MANIFEST_NAME in refusal(bundle)


def test_manifest_that_is_not_utf8(bundle: Path) -> None:
    (bundle / MANIFEST_NAME).write_bytes(b'{"format": "\xff"}')
    assert "not UTF-8" in refusal(bundle)


def set_path(contents: dict[str, Any], path: str, value: object) -> None:
    *parents, last = path.split(".")
    for parent in parents:
        contents = contents[parent]
    contents[last] = value


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("format_version", "1"),
        ("format_version", True),
        ("format_version", 0),
        ("model", []),
        ("model.vocab_size", "2048"),
        ("model.vocab_size", 2048.0),
        ("model.num_layers", 0),
        ("model.num_layers", -1),
        ("model.head_dim", True),
        ("model.rope_theta", "10000"),
        ("cache_dtype", "int4"),
        ("fp32_tensors", "norm.weight"),
        ("graph.logits", "some"),
        ("graph.max_length", None),
        ("graph.inputs", [{"name": "input_ids"}]),
        ("graph.passes", {"fuse": "many"}),
        ("tokens.stop", [1, "107"]),
        ("tokens.bos", 2048),
        ("parity.allowed_failure", 0),
        ("parity", None),
        ("files", []),
        ("files", {"model.onnx": {"size": 1}}),
        ("checkpoint.source", 3),
    ],
    ids=str,
)
def test_misshapen_manifest_names_the_place(bundle: Path, path: str, value: object) -> None:
    edit(bundle, lambda m: set_path(m, path, value))
    assert path in refusal(bundle)


@pytest.mark.parametrize("key", [*sorted(set(manifest(Shape())) - {"format"}), "files"])
def test_missing_key(bundle: Path, key: str) -> None:
    edit(bundle, lambda m: m.pop(key))
    assert key in refusal(bundle)


def test_unknown_check(small_bundle: Path) -> None:
    with pytest.raises(UsageError, match="thorough"):
        open_bundle(small_bundle, "thorough")  # type: ignore[arg-type]


def test_hash_of_a_file_longer_than_a_block(tmp_path: Path) -> None:
    import hashlib

    data = bytes(range(256)) * (5 << 12)
    (tmp_path / "long").write_bytes(data)
    assert hash_file(tmp_path / "long") == hashlib.sha256(data).hexdigest()


def test_file_that_the_manifest_does_not_list(bundle: Path) -> None:
    write_manifest(bundle, manifest(Shape()))
    with pytest.raises(BundleError, match="has no engine"):
        open_bundle(bundle).file("engine")
