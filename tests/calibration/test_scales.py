"""A calibration as a file: it comes back as it was, and what cannot be used is refused."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma_export.calibration.scales import (
    CacheScales,
    CalibrationText,
    LinearScales,
    ScaleTable,
    codes_path,
    graph_digest,
    open_codes,
    require,
)
from gemma_export.errors import GemmaExportError, ScalesError, UsageError
from gemma_export.exporter.config import preset

TEXT = CalibrationText("Zwölf.txt", 128, 65_536, 7, "ab" * 32)
LINEAR = LinearScales("w8", "mse", 256, error=0.25, candidates={"nearest": 0.5, "w8a8-token": 0.0})
TABLE = ScaleTable(
    target="cpu",
    scheme="w8a8-dynamic",
    graph="graph",
    checkpoint="checkpoint",
    text=TEXT,
    smoothing={"layers.0.input_layernorm": (0.5, 1.0, 3.1415927410125732), "layers.0.mlp.up_proj": (2.0,)},
    linears={
        "layers.0.self_attn.qkv_proj": LinearScales("w8a8-token", "gptq"),
        "layers.0.self_attn.o_proj": LinearScales("w8a8-tensor", "nearest", activation_scale=0.125),
        "layers.0.mlp.down_proj": LINEAR,
        "embed_tokens": LinearScales("float", "none"),
    },
    cache=(CacheScales((0.1, 0.2), (0.3, 0.4)),),
    codes="0" * 64,
)

scales = st.floats(1.2e-38, 3.4e38)
errors = st.floats(0, 3.4e38)
names = st.text(min_size=1, max_size=8)
linears = st.builds(
    LinearScales,
    form=st.sampled_from(["float", "w8a8-token", "w8", "w4"]),
    method=st.sampled_from(["nearest", "mse", "none"]),
    block=st.none() | st.integers(1, 512),
    activation_scale=st.none() | scales,
    error=st.none() | errors,
    candidates=st.none() | st.dictionaries(names, errors, max_size=3),
)
tables = st.builds(
    ScaleTable,
    target=names,
    scheme=names,
    graph=names,
    checkpoint=names,
    text=st.none() | st.just(TEXT),
    smoothing=st.dictionaries(names, st.lists(scales, max_size=4).map(tuple), max_size=3),
    linears=st.dictionaries(names, linears, max_size=3),
    cache=st.lists(st.builds(CacheScales, st.just((0.5,)), st.just((0.25, 4.0))), max_size=2).map(tuple),
    codes=st.none() | names,
)


def changed(change: Callable[[dict[str, Any]], object]) -> str:
    data = json.loads(TABLE.to_json())
    change(data)
    return json.dumps(data)


def refusal(text: str) -> ScalesError:
    with pytest.raises(ScalesError) as caught:
        ScaleTable.from_json(text, "scales.json")
    assert "scales.json" in caught.value.message
    assert caught.value.message.endswith(".")
    assert caught.value.hint
    return caught.value


# What is written comes back


@given(tables)
def test_survives_json(table: ScaleTable) -> None:
    assert ScaleTable.from_json(table.to_json()) == table


def test_survives_a_file(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "scales.json"
    TABLE.write(path)
    assert ScaleTable.read(path) == TABLE
    smaller = replace(TABLE, smoothing={}, text=None)
    smaller.write(path)
    assert ScaleTable.read(path) == smaller
    assert [file.name for file in path.parent.iterdir()] == ["scales.json"]


def test_the_name_of_a_text_may_be_no_utf8(tmp_path: Path) -> None:
    table = replace(TABLE, text=replace(TEXT, source="caf\udce9.txt"))
    table.write(tmp_path / "scales.json")
    assert ScaleTable.read(tmp_path / "scales.json") == table


def test_a_person_can_read_it() -> None:
    lines = TABLE.to_json().splitlines()
    assert '  "format": "gemma-export-scales",' in lines
    (line,) = (line for line in lines if "down_proj" in line)  # all of a layer stands in one line
    assert '"form": "w8"' in line
    assert '"error": 0.25' in line


def test_keys_of_a_later_release_are_left_alone() -> None:
    assert ScaleTable.from_json(changed(lambda data: data.update(future=1))) == TABLE


# What is refused


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is not JSON"),
        ('{"format": ', "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[]", "is not a scales file"),
        ("{}", "is not a scales file"),
        ('{"format": "gemma-export-bundle", "format_version": 1}', "is not a scales file"),
        (changed(lambda data: data.update(format_version=2)), "format version 2"),
        (changed(lambda data: data.update(format_version="1")), "not a version number"),
        (changed(lambda data: data.update(format_version=True)), "not a version number"),
        (changed(lambda data: data.pop("format_version")), "not a version number"),
    ],
    ids=["empty", "cut off", "deep", "a list", "no format", "a manifest", "newer", "text", "true", "none"],
)
def test_other_files(text: str, words: str) -> None:
    assert words in refusal(text).message


DOWN = "layers.0.mlp.down_proj"
ATTENTION = "layers.0.self_attn.o_proj"


def linear(**fields: Any) -> Callable[[dict[str, Any]], object]:
    return lambda data: data["linears"][DOWN].update(fields)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda data: data.pop("smoothing"), "smoothing is missing"),
        (lambda data: data["linears"][DOWN].pop("form"), f"linears['{DOWN}'].form is missing"),
        (lambda data: data.update(scheme=3), "scheme is 3; it must be text"),
        (lambda data: data.update(smoothing=[]), "smoothing is []"),
        (lambda data: data["smoothing"].update(x=1.0), "smoothing['x'] is 1.0; it must be a list"),
        (lambda data: data["smoothing"].update(x=[1.0, "2"]), "smoothing['x'][1] is '2'"),
        (lambda data: data["smoothing"].update(x=[True]), "smoothing['x'][0] is True"),
        (lambda data: data.update(text={}), "text.source is missing"),
        (lambda data: data["text"].update(tokens=-1), "text.tokens is -1"),
        (lambda data: data["cache"][0].pop("value"), "cache[0].value is missing"),
        (linear(form="w2"), "form is 'w2'"),
        (linear(method="best"), "method is 'best'"),
        (linear(block=2.5), "block is 2.5"),
        (linear(block=0), "block is 0"),
        (linear(candidates=[]), "candidates is []"),
        (linear(form="w8a8-tensor"), "no activation_scale"),
        (lambda data: data.update(codes=None), "no file of codes is named"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_misshapen_tables(change: Callable[[dict[str, Any]], object], words: str) -> None:
    assert words in refusal(changed(change)).message


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e999", "-1.0", "0", "1e-60", "1" + "0" * 400])
@pytest.mark.parametrize(
    ("path", "place"),
    [
        (("smoothing", "layers.0.input_layernorm", 1), "smoothing['layers.0.input_layernorm'][1]"),
        (("linears", ATTENTION, "activation_scale"), f"linears['{ATTENTION}'].activation_scale"),
        (("cache", 0, "key", 0), "cache[0].key[0]"),
        (("cache", 0, "value", 1), "cache[0].value[1]"),
    ],
    ids=["smoothing", "activation", "key", "value"],
)
def test_numbers_that_are_no_scale(path: tuple[Any, ...], place: str, number: str) -> None:
    def put(data: dict[str, Any]) -> None:
        *outer, last = path
        for key in outer:
            data = data[key]
        data[last] = "NUMBER"

    message = refusal(changed(put).replace('"NUMBER"', number)).message
    assert f"{place} is " in message
    assert "positive and finite" in message


@pytest.mark.parametrize(
    "fields", [{"error": -0.5}, {"error": float("nan")}, {"candidates": {"x": float("inf")}}], ids=str
)
def test_numbers_that_are_no_error(fields: dict[str, Any]) -> None:
    assert "finite and not negative" in refusal(changed(linear(**fields))).message
    table = replace(TABLE, linears={DOWN: replace(LINEAR, **fields)})
    with pytest.raises(ScalesError, match="finite and not negative"):
        table.to_json()  # What could not be read is not written either.


@pytest.mark.parametrize(
    ("content", "error", "words"),
    [(None, UsageError, "There is no file"), (b"\xff\xfe{}", ScalesError, "not UTF-8")],
    ids=["missing", "UTF-16"],
)
def test_files_that_cannot_be_read(
    tmp_path: Path, content: bytes | None, error: type[GemmaExportError], words: str
) -> None:
    path = tmp_path / "scales.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(error, match=words) as caught:
        ScaleTable.read(path)
    assert str(path) in caught.value.message


def test_a_folder_and_a_model_are_no_scales(tmp_path: Path) -> None:
    with pytest.raises(ScalesError, match="cannot be read"):
        ScaleTable.read(tmp_path)
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.truncate(1 << 30)
    with pytest.raises(ScalesError, match="too large"):
        ScaleTable.read(tmp_path / "model.safetensors")


# Whether it belongs to a build


@pytest.mark.parametrize(
    ("build", "words", "hint"),
    [
        (("onnx", "w8a8-dynamic", "graph", "checkpoint"), "made for the target cpu", "--target onnx"),
        (("cpu", "w4a16", "graph", "checkpoint"), "for the scheme w8a8-dynamic", "--scheme w4a16"),
        (("cpu", "w8a8-dynamic", "other", "checkpoint"), "a model of another shape", "this checkpoint"),
        (("cpu", "w8a8-dynamic", "graph", "0123456789abcdef"), "this one's 0123456789ab…", "this one"),
    ],
    ids=["target", "scheme", "graph", "checkpoint"],
)
def test_a_table_of_something_else(build: tuple[str, str, str, str], words: str, hint: str) -> None:
    require(TABLE, "cpu", "w8a8-dynamic", "graph", "checkpoint")
    with pytest.raises(ScalesError) as caught:
        require(TABLE, *build)
    assert words in caught.value.message
    assert hint in caught.value.hint


def test_graph_digest_is_of_names_and_shapes() -> None:
    config = preset("2b")
    digest = graph_digest(config)
    assert digest == graph_digest(replace(config, name="mine", rope_theta=2.0, context_length=4096))
    others = [replace(config, vocab_size=256_128), replace(config, num_layers=17), preset("7b")]
    assert len({digest, *map(graph_digest, others)}) == 4


# The codes beside it


@pytest.fixture
def with_codes(tmp_path: Path) -> tuple[ScaleTable, Path]:
    path = tmp_path / "scales.json"
    codes_path(path).write_bytes(b"codes")
    return replace(TABLE, codes=hashlib.sha256(b"codes").hexdigest()), path


def test_codes_are_verified(with_codes: tuple[ScaleTable, Path]) -> None:
    table, path = with_codes
    assert open_codes(table, path) == path.with_name("scales.codes.safetensors")
    assert open_codes(replace(table, codes=None), path) is None


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda codes: codes.unlink(), "not beside it"),
        (lambda codes: codes.write_bytes(b"other"), "is not the file that scales.json names"),
        (lambda codes: (codes.unlink(), codes.mkdir()), "cannot be read"),
    ],
    ids=["missing", "changed", "a folder"],
)
def test_codes_that_cannot_be_used(
    with_codes: tuple[ScaleTable, Path], damage: Callable[[Path], object], words: str
) -> None:
    table, path = with_codes
    damage(codes_path(path))
    with pytest.raises(ScalesError) as caught:
        open_codes(table, path)
    assert words in caught.value.message
    assert "scales.codes.safetensors" in caught.value.message
