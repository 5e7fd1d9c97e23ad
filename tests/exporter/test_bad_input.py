"""A wrong request, a damaged bundle and a bad prompt or text are refused in one sentence and a hint."""

import shutil
from pathlib import Path

import pytest
from support.command_line import Invoke, assert_refused
from support.damage import Damage, change_json, cut, flip_byte, remove
from support.folders import only

USAGE: dict[str, tuple[list[object], str, str]] = {
    "size": (["--size", "3b"], "no size '3b'", "tiny, tiny2, 2b, 7b"),
    "precision": (["--size", "tiny", "--precision", "int2"], "'int2' cannot be built", "fp32, fp16, bf16"),
    "target": (["--size", "tiny", "--target", "tpu"], "no target 'tpu'", "cpu, onnx, rtx, tensorrt, cuda"),
    "nothing": ([], "Neither a size nor a checkpoint", "--size tiny|tiny2|2b|7b"),
    "two sources": (["--checkpoint", "x", "--random-weights"], "contradict each other", "--random-weights"),
    "random without size": (["--random-weights"], "needs a size", "tiny, tiny2, 2b, 7b"),
    "seed of a checkpoint": (["--size", "tiny", "--seed", "1"], "--seed", "--random-weights"),
    "negative seed": (["--size", "tiny", "--random-weights", "--seed", "-1"], "--seed -1", "0 or more"),
    "no slots": (["--size", "tiny", "--max-length", "0"], "--max-length 0", "at least 1"),
    "too many slots": (["--size", "tiny", "--max-length", "513"], "--max-length 513", "at most 512"),
    "failure of nothing": (
        ["--size", "tiny", "--parity", "none", "--allow-parity-failure"],
        "contradict each other",
        "Leave one",
    ),
}


@pytest.mark.parametrize(("options", "words", "way_out"), USAGE.values(), ids=USAGE)
def test_asked_wrongly(
    options: list[object], words: str, way_out: str, tmp_path: Path, invoke: Invoke
) -> None:
    outcome = invoke(["build", *options, "-o", tmp_path / "b"])
    assert outcome.code == 2
    assert words in outcome.err
    assert way_out in outcome.err.splitlines()[-1]
    only(tmp_path)


def list_file(name: str, **changes: object) -> Damage:
    """Lists a file under a name."""

    def change(manifest: dict[str, dict[str, dict[str, object]]]) -> None:
        manifest["files"][name] = {"size": 6, "sha256": "0" * 64} | changes

    return lambda folder: change_json(folder / "manifest.json", change)


def link_out(folder: Path) -> None:
    (folder / "model.onnx").rename(folder.parent / "model.onnx")
    (folder / "model.onnx").symlink_to("../model.onnx")


BUNDLES: dict[str, tuple[Damage, str]] = {
    "byte of the weights": (lambda folder: flip_byte(folder / "model.onnx.data", 5_000_000), "been changed"),
    "byte of the graph": (lambda folder: flip_byte(folder / "model.onnx", 5_000), "has been changed"),
    "byte of the tokenizer": (lambda folder: flip_byte(folder / "tokenizer.model", 5_000), "been changed"),
    "cut short": (lambda folder: cut(folder / "model.onnx.data", 1), "the manifest says"),
    "file missing": (remove("tokenizer.model"), "tokenizer.model is missing"),
    "path upwards": (list_file("../secret"), "no path inside the bundle"),
    "path from the root": (list_file("/etc/passwd"), "no path inside the bundle"),
    "link out": (link_out, "is a link"),
    "newer format": (
        lambda folder: change_json(
            folder / "manifest.json", lambda manifest: manifest.update(format_version=2)
        ),
        "format version 2",
    ),
    "no manifest": (remove("manifest.json"), "is not a bundle"),
    "manifest damaged": (lambda folder: cut(folder / "manifest.json", 10), "is not JSON"),
    "gone": (shutil.rmtree, "is not there"),
}


ONLY_VERIFY_SEES = "byte of the weights"
"""What a load, which does not read all weights, cannot see."""


@pytest.mark.parametrize("name", BUNDLES)
def test_bad_bundle(name: str, bundle_copy: Path, invoke: Invoke) -> None:
    damage, words = BUNDLES[name]
    damage(bundle_copy)
    (bundle_copy.parent / "secret").write_text("secret")
    assert_refused(invoke(["verify", bundle_copy]), 1, words)
    if name != ONLY_VERIFY_SEES:
        assert_refused(invoke(["generate", bundle_copy, "Once"]), 1, words)


PROMPTS: dict[str, tuple[list[object], int, str]] = {
    "empty": ([""], 2, "The prompt is empty"),
    "too long": (["Once upon a time " * 200], 1, "512"),
    "not UTF-8": (["caf\udce9"], 2, "not valid UTF-8"),
    "no room to write": (["Once", "--max-new-tokens", "0"], 2, "max_new_tokens"),
    "temperature": (["Once", "--temperature", "-1"], 2, "temperature"),
    "temperature not a number": (["Once", "--temperature", "nan"], 2, "temperature"),
    "top-p": (["Once", "--top-p", "2"], 2, "top_p"),
    "threads": (["Once", "--threads", "0"], 2, "threads"),
}


@pytest.mark.parametrize(("arguments", "code", "words"), PROMPTS.values(), ids=PROMPTS)
def test_bad_prompt(
    arguments: list[object], code: int, words: str, tiny_bundle: Path, invoke: Invoke
) -> None:
    assert_refused(invoke(["generate", tiny_bundle, *arguments]), code, words)


@pytest.mark.parametrize(
    ("data", "words"),
    [(None, "There is no file"), (b"caf\xe9", "not UTF-8"), (b" \n", "has no text")],
    ids=["missing", "not UTF-8", "empty"],
)
def test_parity_on_bad_text(
    data: bytes | None, words: str, tmp_path: Path, tiny_bundle: Path, invoke: Invoke
) -> None:
    if data is not None:
        (tmp_path / "text").write_bytes(data)
    assert_refused(invoke(["parity", tiny_bundle, "--text", tmp_path / "text"]), 2, words)
