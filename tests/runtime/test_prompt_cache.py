"""What a cache holds of a prompt is not run again, and the answer is the same; in memory and as a file."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.small_bundle import Shape, write_bundle

from gemma_export.errors import ContextFullError, SavedCacheError, StorageError, UsageError
from gemma_export.runtime.prompt_cache import PromptCache
from gemma_export.runtime.session import Session, load

LONG = "Once upon a time there was a king"
PROMPTS = [LONG, f"{LONG} and a queen", "Once upon a time", LONG, "Nothing of it", f"{LONG}, he said"]
OPTIONS: dict[str, Any] = {"max_new_tokens": 6, "stop_tokens": ()}


def common(first: list[int], second: list[int]) -> int:
    return next(
        (i for i, pair in enumerate(zip(first, second, strict=False)) if pair[0] != pair[1]),
        min(len(first), len(second)),
    )


@settings(max_examples=20, deadline=None)
@given(st.lists(st.sampled_from(PROMPTS), min_size=2, max_size=5), st.integers(0, 6))
def test_one_prompt_after_the_other_gets_what_it_gets_alone(
    session: Session, prompts: list[str], read: int
) -> None:
    cache = session.new_prompt_cache()
    for prompt in prompts:
        tokens = session.tokenizer.encode(prompt)
        # The last token that was generated has not been run.
        held = min(common(list(cache.tokens[: cache.cache.length]), tokens), len(tokens) - 1)
        generation = session.generate(prompt, prompt_cache=cache, **OPTIONS)
        for _ in zip(range(read), generation, strict=False):
            pass  # Some are not read to their end, some not at all.
        stats = session.generate(prompt, **OPTIONS)
        assert generation._row.new_tokens == stats.tokens[: len(generation._row.new_tokens)]
        assert list(cache.tokens) == [*tokens, *generation._row.new_tokens]
        assert generation._reused_tokens == held


@pytest.fixture(scope="module")
def rolling(tmp_path_factory: pytest.TempPathFactory) -> Session:
    """Caches of 16 slots, of which a query sees 8: a row can go back 9 tokens, and else begins again."""
    shape = Shape(slots=160, window=8, chunk=9)
    return load(write_bundle(tmp_path_factory.mktemp("rolling") / "bundle", shape), threads=1)


@pytest.mark.parametrize("draft_tokens", [0, 7])
def test_caches_that_roll_are_reused_as_far_as_they_can(
    rolling: Session, tmp_path: Path, draft_tokens: int
) -> None:
    story = f"{LONG} and a queen, and they had a son. "
    prompts = [f"{story * 2}He", f"{story * 2}She", story, f"{story * 2}He went", f"{story * 2}He went away"]
    cache = rolling.new_prompt_cache()
    reused = []
    for prompt in prompts:
        options: dict[str, Any] = {"max_new_tokens": 3, "stop_tokens": (), "draft_tokens": draft_tokens}
        generation = rolling.generate(prompt, prompt_cache=cache, **options)
        assert generation.tokens == rolling.generate(prompt, **options).tokens
        reused.append(generation.stats.reused_tokens)
        places = [cache.cache.reusable(length) for length in range(cache.cache.length)]
        rolling.save_cache(cache, tmp_path / "kept")
        cache = rolling.load_cache(tmp_path / "kept")
        assert [cache.cache.reusable(length) for length in range(cache.cache.length)] == places
    # A few words back, and forward, but not to where the story had been told once.
    assert [count > 0 for count in reused] == [False, True, False, True, True]


def test_what_is_reused_is_told(session: Session) -> None:
    cache = session.new_prompt_cache()
    session.read(LONG, cache)
    read = len(cache.tokens)
    assert cache.cache.length == read
    stats = session.generate(f"{LONG} and a queen", prompt_cache=cache, **OPTIONS).stats
    total = session.count_tokens(f"{LONG} and a queen")
    assert (stats.reused_tokens, stats.prefill_tokens) == (read, total - read)
    stats = session.generate(LONG, prompt_cache=cache, **OPTIONS).stats
    assert (stats.reused_tokens, stats.prefill_tokens) == (read - 1, 1)


def test_a_prompt_that_does_not_fit_leaves_the_cache_as_it_was(session: Session) -> None:
    cache = session.new_prompt_cache()
    session.read(LONG, cache)
    before = cache.tokens, cache.cache.length
    for run in (session.read, lambda prompt, cache: session.generate(prompt, prompt_cache=cache)):
        with pytest.raises(ContextFullError):
            run("a long story " * 40, cache)
        assert (cache.tokens, cache.cache.length) == before


def test_a_generation_ends_where_another_takes_its_cache(session: Session) -> None:
    cache = session.new_prompt_cache()
    first = session.generate(LONG, prompt_cache=cache, **OPTIONS)
    next(iter(first))
    second = session.generate("Once upon", prompt_cache=cache, **OPTIONS)
    assert first.finish_reason == "interrupted"
    assert second.tokens == session.generate("Once upon", **OPTIONS).tokens


@pytest.fixture(scope="module", params=["float32", "float16", "bfloat16"])
def typed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Session:
    shape = Shape(cache_dtype=request.param)
    return load(write_bundle(tmp_path_factory.mktemp("typed") / "bundle", shape), threads=1)


def test_a_saved_cache_goes_on_as_the_one_it_was(typed: Session, tmp_path: Path) -> None:
    cache, file = typed.new_prompt_cache(), tmp_path / "kept"
    str(typed.generate(LONG, prompt_cache=cache, **OPTIONS))
    typed.save_cache(cache, file)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    loaded = typed.load_cache(file)
    assert loaded.tokens == cache.tokens
    assert loaded.cache.length == cache.cache.length
    for layer in range(2):
        for part in ("keys", "values"):
            filled = [getattr(one.cache, part)(layer) for one in (loaded, cache)]
            assert filled[0].any()
            np.testing.assert_array_equal(*filled)
    again = typed.generate(f"{LONG} and a queen", prompt_cache=loaded, **OPTIONS)
    assert again.stats.reused_tokens > 3
    assert again.tokens == typed.generate(f"{LONG} and a queen", prompt_cache=cache, **OPTIONS).tokens


def test_a_saved_dialogue_goes_on(session: Session, tmp_path: Path) -> None:
    first = session.chat()
    str(first.say("Hi", **OPTIONS))
    session.save_cache(first.prompt_cache, tmp_path / "dialogue")
    second = session.chat(session.load_cache(tmp_path / "dialogue"))
    assert second.say("Go on", **OPTIONS).tokens == first.say("Go on", **OPTIONS).tokens
    assert second.tokens == first.tokens


@pytest.fixture(scope="module")
def saved(session: Session, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "cache"
    cache = session.new_prompt_cache()
    session.read("Once", cache)
    session.save_cache(cache, path)
    return path


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_damage_is_refused_or_changes_nothing(
    session: Session, saved: Path, tmp_path: Path, data: st.DataObject
) -> None:
    whole = saved.read_bytes()
    place = data.draw(st.integers(0, len(whole) - 1))
    cut = data.draw(st.booleans())
    damaged = bytearray(whole[:place] if cut else whole)
    if not cut:
        damaged[place] ^= data.draw(st.integers(1, 255))
    file = tmp_path / "damaged"
    file.write_bytes(damaged)
    try:
        found = session.load_cache(file)
    except SavedCacheError:
        return
    expected = session.load_cache(saved)  # Some bytes of a zip are read by nobody.
    assert not cut
    assert found.tokens == expected.tokens
    for one, other in zip(found.cache.key_buffers, expected.cache.key_buffers, strict=True):
        np.testing.assert_array_equal(one, other)


def rewritten(saved: Path, to: Path, **changes: Any) -> Path:
    with np.load(saved) as file:
        arrays = {**file, **{name: value for name, value in changes.items() if name != "header"}}
        header = {**json.loads(bytes(file["header"])), **changes.get("header", {})}
    arrays["header"] = np.frombuffer(json.dumps(header).encode(), np.uint8)
    arrays = {name: array for name, array in arrays.items() if array is not None}
    with to.open("wb") as file:
        np.savez(file, **arrays)
    return to


def forgeries() -> Iterator[tuple[str, dict[str, Any]]]:
    yield "format version is 2", {"header": {"format_version": 2}}
    yield "something else", {"header": {"format": "other"}}
    yield "header", {"header": {"length": "many"}}
    yield "tokens", {"header": {"length": 1000}}
    yield "tokens", {"header": {"length": 0}}
    yield "tokens", {"header": {"written": 0}}
    yield "tokens", {"tokens": np.array([2, 5000])}
    yield "tokens", {"tokens": np.array([[2, 3]])}
    yield "tokens", {"tokens": np.array([2.0, 3.0])}
    yield "0.key", {"0.key": None}
    yield "0.key is float64", {"0.key": np.zeros((2, 2, 16))}
    yield r"0.key is float32 \[2, 1, 16\]", {"0.key": np.zeros((2, 1, 16), np.float32)}
    yield "allow_pickle", {"tokens": np.array([{}, []], object)}


@pytest.mark.parametrize(("words", "changes"), list(forgeries()), ids=lambda value: str(value)[:40])
def test_what_is_not_understood_is_refused(
    session: Session, saved: Path, tmp_path: Path, words: str, changes: dict[str, Any]
) -> None:
    assert rewritten(saved, tmp_path / "same").is_file()
    assert session.load_cache(tmp_path / "same").tokens == session.load_cache(saved).tokens
    with pytest.raises(SavedCacheError, match=words):
        session.load_cache(rewritten(saved, tmp_path / "other", **changes))


def test_another_bundle_is_refused(session: Session, saved: Path, tmp_path: Path) -> None:
    for name, shape in {
        "weights": Shape(seed=1),
        "context": Shape(slots=32),
        "dtype": Shape(cache_dtype="float16"),
    }.items():
        other = load(write_bundle(tmp_path / name, shape), threads=1)
        with pytest.raises(
            SavedCacheError, match="saved by another bundle, small in fp32 for cpu with 64 slots"
        ):
            other.load_cache(saved)
    copy = load(shutil.copytree(session.bundle.path, tmp_path / "copy"), threads=1)
    assert copy.load_cache(saved).tokens


def test_files_that_are_no_saved_cache(session: Session, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is not there"):
        session.load_cache(tmp_path / "missing")
    (tmp_path / "text").write_text("hello")
    np.save(tmp_path / "array.npy", np.zeros(3))
    np.savez(tmp_path / "arrays.npz", a=np.zeros(3))
    for name in ("text", "array.npy", "arrays.npz", "."):
        with pytest.raises(SavedCacheError, match="no saved cache"):
            session.load_cache(tmp_path / name)


def test_nothing_is_half_written(session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = session.new_prompt_cache()
    with pytest.raises(UsageError, match="nothing has been read"):
        session.save_cache(cache, tmp_path / "cache")
    session.read(LONG, cache)
    (tmp_path / "cache").write_text("older")

    def full(file: Any, **arrays: Any) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(StorageError, match="takes no more"):
        session.save_cache(cache, tmp_path / "cache")
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]
    assert (tmp_path / "cache").read_text() == "older"


def test_a_cache_on_a_device_is_not_saved(session: Session, tmp_path: Path) -> None:
    cache = session.new_prompt_cache()
    session.read(LONG, cache)
    device = [type("DeviceBuffer", (), {"shape": buffer.shape})() for buffer in cache.cache.key_buffers]
    cache.cache.key_buffers = tuple(device)
    with pytest.raises(UsageError, match="on a device"):
        session.save_cache(PromptCache(cache.cache, cache.tokens), tmp_path / "cache")
