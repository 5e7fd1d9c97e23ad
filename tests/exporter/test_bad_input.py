"""What is wrong with the input is said in one sentence and a hint, and leaves no half bundle."""

import errno
import json
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.checkpoints import LITTLE, state_dict, write_config, write_google, write_sharded, write_single
from support.command_line import Outcome, assert_refused
from support.damage import change_json, change_weights, cut, flip_byte

from gemma_export.exporter import bundle, pipeline
from gemma_export.exporter.config import tiny_folder
from gemma_export.graphs import direct_file

Invoke = Callable[[list[object]], Outcome]
Damage = Callable[[Path], object]

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


def remove(name: str) -> Damage:
    return lambda folder: (folder / name).unlink()


def only(folder: Path, *names: str) -> None:
    """Nothing else is in a folder, not even hidden."""
    assert sorted(path.name for path in folder.iterdir()) == sorted(names)


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


def refuse_room(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")._replace(free=bundle.MARGIN_BYTES)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)


def fill_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    left = 10_000_000

    write = os.write

    def write_some(descriptor: int, data: memoryview) -> int:
        nonlocal left
        left -= len(data)
        if left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, data)

    monkeypatch.setattr(direct_file.os, "write", write_some)


def fill_disk_late(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    monkeypatch.setattr(pipeline, "write_report", full)
    monkeypatch.setattr(pipeline, "_check_parity", lambda *arguments: object())


@pytest.mark.usefixtures("traced_once")
@pytest.mark.parametrize(
    ("fill", "words"),
    [
        pytest.param(refuse_room, "The bundle needs 0.02 GB", id="seen beforehand"),
        pytest.param(fill_disk, "No space left on device", id="at the weights"),
        pytest.param(fill_disk_late, "Disk quota exceeded", id="at the report"),
    ],
)
def test_full_disk(
    fill: Callable[[pytest.MonkeyPatch], None],
    words: str,
    tmp_path: Path,
    invoke: Invoke,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fill(monkeypatch)
    assert_refused(invoke(["build", "--size", "tiny", "-o", tmp_path / "b", "-q"]), 1, words)
    only(tmp_path)


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.usefixtures("traced_once")
@pytest.mark.parametrize("size", [1_000, 100_000], ids=["at the tokenizer", "at the weights"])
def test_system_refuses_to_write_more(size: int, tmp_path: Path, invoke: Invoke) -> None:
    with largest_file(size):
        outcome = invoke(["build", "--size", "tiny", "-o", tmp_path / "b", "-q"])
    assert_refused(outcome, 1, "takes no more: File too large")
    only(tmp_path)


# Even root can make no folder in these.
@pytest.mark.parametrize(
    ("output", "words"),
    [
        pytest.param("/proc/bundle", "cannot be written", id="no folders there"),
        pytest.param("/sys/kernel/bundle", "cannot be written", id="not permitted"),
        pytest.param("/dev/null/bundle", "cannot be written", id="below a file"),
        pytest.param("x" * 300, "cannot be written: File name too long", id="name too long"),
    ],
)
def test_unwritable_output(
    output: str, words: str, tmp_path: Path, invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert_refused(invoke(["build", "--size", "tiny", "-o", output, "-q"]), 1, words)
    only(tmp_path)


def test_read_only_file_system(tmp_path: Path, invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, *arguments: object, **options: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    outcome = invoke(["build", "--size", "tiny", "-o", tmp_path / "b", "-q"])
    assert_refused(outcome, 1, "cannot be written: Read-only file system")
    only(tmp_path)


def other_folder(output: Path) -> None:
    output.mkdir()
    (output / "thesis.txt").write_text("years of work")


def other_manifest(output: Path) -> None:
    output.mkdir()
    (output / "manifest.json").write_text('{"name": "a web extension"}')


OTHERS: dict[str, Callable[[Path], object]] = {
    "folder": other_folder,
    "folder with another manifest": other_manifest,
    "file": lambda output: output.write_text("years of work"),
    "link": lambda output: output.symlink_to("elsewhere"),
}


@pytest.mark.parametrize("make", OTHERS.values(), ids=OTHERS)
@pytest.mark.parametrize("force", [[], ["--force"]], ids=["", "force"])
def test_output_that_is_not_ours(
    make: Callable[[Path], object], force: list[str], tmp_path: Path, invoke: Invoke
) -> None:
    output = tmp_path / "b"
    make(output)
    before = [(path, path.lstat().st_mtime_ns) for path in sorted(tmp_path.rglob("*"))]
    assert_refused(invoke(["build", "--size", "tiny", "-o", output, "-q", *force]), 2, str(output), "exists")
    assert [(path, path.lstat().st_mtime_ns) for path in sorted(tmp_path.rglob("*"))] == before


def test_older_bundle_needs_force(bundle_copy: Path, invoke: Invoke) -> None:
    outcome = invoke(["build", "--size", "tiny", "-o", bundle_copy, "-q"])
    assert_refused(outcome, 2, "already holds a bundle")
    assert "--force" in outcome.err


@pytest.mark.usefixtures("traced_once")
def test_force_replaces_a_bundle_only_by_a_finished_one(
    bundle_copy: Path, invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = ["build", "--size", "tiny", "-o", bundle_copy, "-q", "--force", "--parity", "none"]
    before = (bundle_copy / "manifest.json").read_text()
    with monkeypatch.context() as patch:
        fill_disk(patch)
        assert_refused(invoke(build), 1, "No space left")
    assert (bundle_copy / "manifest.json").read_text() == before
    assert invoke(["verify", bundle_copy]).code == 0
    assert invoke(build) == Outcome(0, "", "")
    assert json.loads((bundle_copy / "manifest.json").read_text())["parity"]["verdict"] == "not run"
    assert invoke(["verify", bundle_copy]).code == 0
    only(bundle_copy.parent, bundle_copy.name)


USAGE: dict[str, tuple[list[object], str, str]] = {
    "size": (["--size", "3b"], "no size '3b'", "tiny, 2b, 7b"),
    "precision": (["--size", "tiny", "--precision", "int2"], "'int2' cannot be built", "fp32, fp16, bf16"),
    "target": (["--size", "tiny", "--target", "tpu"], "no target 'tpu'", "cpu and onnx"),
    "nothing": ([], "Neither a size nor a checkpoint", "--size tiny|2b|7b"),
    "two sources": (["--checkpoint", "x", "--random-weights"], "contradict each other", "--random-weights"),
    "random without size": (["--random-weights"], "needs a size", "tiny, 2b, 7b"),
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
