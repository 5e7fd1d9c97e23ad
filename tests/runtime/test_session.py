import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.small_bundle import Shape, contract, manifest, write_bundle, write_manifest

from gemma_export.errors import BundleError, ContextFullError, GemmaExportError, PromptError, UsageError
from gemma_export.runtime import onnxruntime
from gemma_export.runtime.session import Session, load

TOKENS = [2, 651, 9, 300, 1200, 77, 1999, 5, 41, 41, 8]


def test_imports_nothing_heavy() -> None:
    code = """
import sys
import gemma_export.runtime.chat, gemma_export.runtime.parity, gemma_export.runtime.onnxruntime
import gemma_export.runtime.session
heavy = {"torch", "onnx", "onnx_ir", "onnxscript", "transformers", "safetensors", "tokenizers", "matplotlib"}
rooms = {f"gemma_export.{room}" for room in ("exporter", "graphs", "calibration")}
print(*sorted((heavy | rooms) & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_loading_and_running_prints_nothing(small_bundle: Path) -> None:
    code = """
import sys
import gemma_export
session = gemma_export.load(sys.argv[1], threads=1)
str(session.generate("Once", max_new_tokens=4))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(small_bundle)], capture_output=True, text=True, check=True
    )
    assert done.stdout == done.stderr == ""


def test_onnxruntime_is_asked_for_by_name(small_bundle: Path) -> None:
    code = """
import sys
sys.modules["onnxruntime"] = None  # as if it were not installed
import gemma_export
from gemma_export.errors import MissingDependencyError
try:
    gemma_export.load(sys.argv[1])
except MissingDependencyError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(small_bundle)], capture_output=True, text=True, check=True
    )
    assert "pip install 'gemma-export[cpu]'" in done.stdout


def test_an_error_of_onnxruntime_is_one_of_ours(session: Session) -> None:
    beyond = np.array([[session.max_length]])
    with pytest.raises(GemmaExportError, match=r"onnxruntime could not run tokens \[1, 1\]"):
        session._backend.run(np.array([[5]]), beyond, session.new_cache())


def test_cached_steps_equal_the_full_pass(session: Session) -> None:
    full = session.logits(TOKENS)
    cache = session.new_cache()
    steps = [session.step([[token]], cache)[0, 0] for token in TOKENS]
    # fp32 sums in another order; the logits are of order 10.
    np.testing.assert_allclose(np.stack(steps), full, atol=1e-4)
    assert cache.length == len(TOKENS)


@pytest.mark.parametrize("sizes", [(11,), (1, 10), (10, 1), (7, 4), (3, 3, 3, 2)])
def test_a_step_may_have_any_number_of_tokens(session: Session, sizes: tuple[int, ...]) -> None:
    cache = session.new_cache()
    parts = np.split(np.array(TOKENS), np.cumsum(sizes)[:-1])
    logits = np.concatenate([session.step(part[None], cache)[0] for part in parts])
    np.testing.assert_allclose(logits, session.logits(TOKENS), atol=1e-4)


def test_last_logits_are_the_last_of_all(session: Session, last_session: Session) -> None:
    logits = last_session.step([TOKENS], last_session.new_cache())
    assert logits.shape == (1, 1, 2048)
    np.testing.assert_allclose(logits[0, 0], session.logits(TOKENS)[-1], atol=1e-4)


def test_logits_of_a_text_longer_than_a_chunk(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = session.logits(TOKENS)
    monkeypatch.setattr("gemma_export.runtime.session._LOGITS_CHUNK", 4)
    np.testing.assert_allclose(session.logits(TOKENS), whole, atol=1e-4)
    assert whole.shape == (len(TOKENS), 2048)
    assert whole.dtype == np.float32


def test_logits_need_a_bundle_that_gives_them(last_session: Session) -> None:
    with pytest.raises(UsageError, match="--logits all"):
        last_session.logits(TOKENS)


def test_the_cache_is_written_in_place(session: Session) -> None:
    cache = session.new_cache(batch=2)
    buffers = [*cache.key_buffers, *cache.value_buffers]
    addresses = [buffer.ctypes.data for buffer in buffers]
    session.step([TOKENS, TOKENS], cache)
    binding = session._backend._bound[cache]._binding  # type: ignore[attr-defined]
    for _ in range(3):
        before = [buffer.copy() for buffer in buffers]
        session.step([[5], [6]], cache)
        bound = {value.data_ptr() for value in binding.get_outputs()}
        assert set(addresses) <= bound
        assert [buffer.ctypes.data for buffer in buffers] == addresses
        for old, new in zip(before, buffers, strict=True):
            written = cache.length - 1
            assert new[:, :, written].any()
            np.testing.assert_array_equal(np.delete(new, written, axis=2), np.delete(old, written, axis=2))


def test_steps_keep_their_buffers(session: Session) -> None:
    cache = session.new_cache()
    session.step([[5]], cache)
    bound = session._backend._bound[cache]  # type: ignore[attr-defined]
    buffers = [bound._input_ids, bound._position_ids, bound._logits]
    session.step([[6]], cache)
    assert all(
        new is old
        for new, old in zip([bound._input_ids, bound._position_ids, bound._logits], buffers, strict=True)
    )


def test_a_cache_that_is_gone_is_not_held(session: Session) -> None:
    held = len(session._backend._bound)  # type: ignore[attr-defined]
    session.step([[5]], session.new_cache())
    assert len(session._backend._bound) == held  # type: ignore[attr-defined]


def test_step_gives_logits_that_stay(session: Session) -> None:
    cache = session.new_cache()
    first = session.step([[5]], cache)
    kept = first.copy()
    session.step([[6]], cache)
    np.testing.assert_array_equal(first, kept)


def test_keys_are_of_the_filled_slots(session: Session) -> None:
    cache = session.new_cache()
    session.step([TOKENS], cache)
    assert cache.keys(1).shape == (1, 2, len(TOKENS), 16)
    assert cache.values(0).any(axis=(1, 3)).all()


def test_a_full_cache_is_refused_before_it_is_overwritten(session: Session) -> None:
    cache = session.new_cache()
    session.step(np.full((1, 64), 9), cache)
    before = [buffer.copy() for buffer in (*cache.key_buffers, *cache.value_buffers)]
    with pytest.raises(ContextFullError, match="64 tokens and 1 new ones"):
        session.step([[5]], cache)
    for old, new in zip(before, (*cache.key_buffers, *cache.value_buffers), strict=True):
        np.testing.assert_array_equal(old, new)
    assert cache.length == 64


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_caches(session: Session, tmp_path: Path, dtype: str) -> None:
    half = load(write_bundle(tmp_path / "half", Shape(cache_dtype=dtype)), threads=1)
    cache = half.new_cache()
    logits = np.concatenate([half.step([[token]], cache)[0] for token in TOKENS])
    exact = session.new_cache()
    reference = session.step([TOKENS], exact)[0]
    # Keys of order 3 rounded to 11 or 8 significant bits.
    tolerance = {"float16": 2e-3, "bfloat16": 2e-2}[dtype]
    np.testing.assert_allclose(cache.keys(0), exact.keys(0), atol=tolerance)
    assert np.abs(logits - reference).max() < 10 * tolerance * np.abs(reference).max()


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([], "no token"),
        ([2048], "2048 is outside the vocabulary"),
        ([-1], "-1 is outside"),
        ([2.5], "not whole numbers"),
        (["a"], "not whole numbers"),
        ([True], "not whole numbers"),
        ([[2]], "not whole numbers"),
        ([[2], [3, 4]], "not whole numbers"),
        (2, "not whole numbers"),
    ],
    ids=str,
)
def test_tokens_that_are_none(session: Session, tokens: Any, message: str) -> None:
    with pytest.raises(PromptError, match=message):
        session.generate_tokens(tokens, max_new_tokens=1)
    with pytest.raises(PromptError, match=message):
        session.logits(tokens)


def test_step_wants_a_row_of_tokens_per_row(session: Session) -> None:
    with pytest.raises(UsageError, match="1 rows of tokens; the cache has 2"):
        session.step([[5]], session.new_cache(batch=2))
    with pytest.raises(PromptError, match=r"\[B, T\]"):
        session.step([5], session.new_cache())
    with pytest.raises(UsageError, match="batch is 0"):
        session.new_cache(batch=0)


def test_count_tokens_counts_the_beginning(session: Session) -> None:
    assert session.count_tokens("a") == 2


def test_threads_below_one(small_bundle: Path) -> None:
    with pytest.raises(UsageError, match="threads is 0"):
        load(small_bundle, threads=0)


@pytest.fixture
def copy(small_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(small_bundle, tmp_path / "bundle"))


def test_a_graph_that_is_none(copy: Path) -> None:
    (copy / "model.onnx").write_bytes(b"no graph")
    write_manifest(copy, manifest(Shape()))
    with pytest.raises(BundleError, match=r"onnxruntime .* cannot load") as caught:
        load(copy)
    assert "1.30" in caught.value.hint


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layers": 3}, "past_key_values.2.key"),
        ({"num_layers": 1}, "unknown"),
        ({"head_dim": 8}, "manifest says"),
        ({"vocab_size": 4096}, "logits"),
    ],
    ids=str,
)
def test_a_graph_of_another_contract(copy: Path, change: dict[str, int], message: str) -> None:
    contents = manifest(Shape())
    contents["model"].update(change)
    write_manifest(copy, contents)
    with pytest.raises(BundleError, match=message):
        load(copy)


def test_a_graph_with_another_cache_dtype(copy: Path) -> None:
    write_manifest(copy, {**manifest(Shape()), "cache_dtype": "float16"})
    with pytest.raises(BundleError, match="float16"):
        load(copy)


def test_a_graph_with_other_logits(copy: Path) -> None:
    write_manifest(copy, manifest(Shape(logits="last")))
    with pytest.raises(BundleError, match="logits"):
        load(copy)


def test_a_tokenizer_with_another_beginning(copy: Path) -> None:
    contents = manifest(Shape())
    contents["tokens"]["bos"] = 5
    write_manifest(copy, contents)
    with pytest.raises(BundleError, match="<bos> is 2, the manifest says 5"):
        load(copy)


def test_load_checks_first(copy: Path) -> None:
    contents = json.loads((copy / "manifest.json").read_text())
    contents["format_version"] = 2
    (copy / "manifest.json").write_text(json.dumps(contents))
    with pytest.raises(BundleError, match="format version 2"):
        load(copy)


def test_the_support_code_lists_what_the_graph_has() -> None:
    inputs, outputs = contract(Shape())
    assert len(inputs) == 6
    assert len(outputs) == 5


def test_repr_names_the_model(session: Session) -> None:
    assert repr(session).startswith("<Session of small, fp32")


@pytest.mark.parametrize(
    ("cpuinfo", "exact"),
    [
        ("processor : 0\nflags : fpu sse avx2\n", False),
        ("processor : 0\nflags : fpu avx2 avx512_vnni\n", True),
        ("processor : 0\nflags : fpu avx2 avx_vnni\n", True),
        ("processor : 0\nFeatures : fp asimd asimddp\n", True),
    ],
    ids=["AVX2 alone", "AVX-512 VNNI", "AVX VNNI", "ARM"],
)
def test_processors_whose_integer_products_saturate(cpuinfo: str, exact: bool, tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text(cpuinfo)
    assert onnxruntime.has_integer_dot_product(tmp_path / "cpuinfo") == exact
