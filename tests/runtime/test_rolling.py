"""A session over caches that roll says what one says whose caches keep every position."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.engine_bundle import (
    DECODE,
    PREFILL,
    FakeEngineFile,
    decode_batch,
    write_engine_bundle,
)
from support.fake_tensorrt import FakeTensorRT
from support.small_bundle import Shape, write_bundle

from gemma_export.errors import BundleError, OverwrittenError
from gemma_export.runtime.session import Session, load

WINDOW = 8
FULL = Shape(slots=160, window=WINDOW)
# Rows of 16 slots, which TensorRT can take several of: it aligns addresses.
ROLLING = replace(FULL, chunk=9)
PROMPTS = [
    [2, 651, 9, 300, 17],
    [2, *range(300, 315)],
    [2, *range(900, 960)],
    [2, 8, 8, 8, 8, 8, 8, 1200, 44, 9, 1200, 44, 9, 1200] * 3,
]
TOLERANCE = 1e-4
"""The same operators over other steps: fp32 sums some thousand numbers of order 1 in another order."""

Open = Callable[[], Session]


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Session:
    return load(write_bundle(tmp_path_factory.mktemp("rolling") / "full", FULL), threads=1)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("rolling") / "rolling", ROLLING)


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rolling") / "engines"
    engine = FakeEngineFile((PREFILL, DECODE, decode_batch(2, 4)))
    return write_engine_bundle(folder, ROLLING, engine)


@pytest.fixture(params=["onnxruntime", "TensorRT"])
def rolling(request: pytest.FixtureRequest, bundle: Path, engines: Path, tensorrt: FakeTensorRT) -> Session:
    return load(bundle, threads=1) if request.param == "onnxruntime" else load(engines)


@pytest.mark.parametrize("chunk", [1, 5, 9, 64])
def test_text_of_any_chunks(chunk: int, rolling: Session, full: Session) -> None:
    for prompt in PROMPTS:
        found = rolling.generate_tokens(prompt, max_new_tokens=60, stop_tokens=(), prefill_chunk=chunk)
        assert found == full.generate_tokens(prompt, max_new_tokens=60, stop_tokens=())


def test_logits_of_every_token(rolling: Session, full: Session) -> None:
    tokens = (PROMPTS[2] * 3)[:150]
    np.testing.assert_allclose(rolling.logits(tokens), full.logits(tokens), atol=TOLERANCE)


@pytest.mark.parametrize("drafts", [0, 4, 30])
def test_rows_of_a_batch(drafts: int, rolling: Session, full: Session) -> None:
    found = rolling.generate_tokens_batch(PROMPTS, max_new_tokens=50, stop_tokens=(), draft_tokens=drafts)
    wanted = full.generate_tokens_batch(PROMPTS, max_new_tokens=50, stop_tokens=())
    assert [row.tokens for row in found] == [row.tokens for row in wanted]


def test_steps_of_several_rows(rolling: Session, full: Session) -> None:
    steps, found = np.random.default_rng(0).integers(300, 2000, (3, 60)), []
    for session in (rolling, full):
        cache = session.new_cache(3)
        for row, prompt in enumerate(PROMPTS[:3]):
            session.step([prompt], cache.row(row))
        found.append([session.step(steps[:, :7], cache), session.step(steps[:, 7:], cache)])
    for ours, theirs in zip(*found, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=TOLERANCE)


def test_a_dialogue(rolling: Session, full: Session) -> None:
    said = ["Hi", "Why is that so?", "Well, and then what came of it?"]
    conversations = rolling.chat(), full.chat()
    answers = [[talk.say(text, max_new_tokens=9).tokens for text in said] for talk in conversations]
    assert answers[0] == answers[1]
    assert len(conversations[0].tokens) > 4 * WINDOW


def test_prompts_that_begin_alike(rolling: Session, full: Session) -> None:
    """What the cache does not hold any more is read again."""
    texts = ["Once upon a time there was", "Once upon a time there was a fox", "Once upon a day", "Once"]
    kept = rolling.new_prompt_cache()
    for text in texts:
        generation = rolling.generate(text, prompt_cache=kept, max_new_tokens=30, stop_tokens=())
        assert generation.tokens == full.generate(text, max_new_tokens=30, stop_tokens=()).tokens
        assert generation.stats.prefill_tokens == rolling.count_tokens(text)


def test_an_answer_that_is_given_again(rolling: Session) -> None:
    """A few tokens back, what they saw is still there."""
    kept, text = rolling.new_prompt_cache(), "Once upon a time there was a fox who could not sleep"
    first = rolling.generate(text, prompt_cache=kept, max_new_tokens=4, stop_tokens=())
    tokens = first.tokens
    second = rolling.generate(text, prompt_cache=kept, max_new_tokens=4, stop_tokens=())
    assert first.stats.prefill_tokens == rolling.count_tokens(text)
    assert second.tokens == tokens
    assert second.stats.prefill_tokens == 1


def test_a_step_that_was_interrupted_is_run_again(
    bundle: Path, full: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    rolling = load(bundle, threads=1)
    cache, other = rolling.new_cache(), full.new_cache()
    for session, filled in ((rolling, cache), (full, other)):
        session.step([PROMPTS[2]], filled)
    with monkeypatch.context() as patch:
        patch.setattr(type(cache), "advance", interrupt)
        with pytest.raises(KeyboardInterrupt):
            rolling.step([[5] * 9], cache)
    for token in PROMPTS[0]:
        np.testing.assert_allclose(
            rolling.step([[token]], cache), full.step([[token]], other), atol=TOLERANCE
        )
    with monkeypatch.context() as patch:
        patch.setattr(type(cache), "advance", interrupt)
        with pytest.raises(KeyboardInterrupt):
            rolling.step([[5] * 30], cache)
    with pytest.raises(OverwrittenError, match="Run the text from its beginning"):
        rolling.step([[5]], cache)


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"slots": 15}, "15 slots are less than the 16"),
        ({"chunk": 10}, "16 slots are less than the 17"),
        ({"chunk": 0}, "chunk is 0"),
        ({"window": 0}, "window is 0"),
        ({"layers": [2]}, r"layer \[2\] is none of the 2"),
        ({"layers": []}, r"past_key_values\.0\.key"),
        ({"layers": [0, 1]}, r"past_key_values\.1\.key"),
    ],
    ids=str,
)
def test_a_manifest_of_another_cache_is_refused(
    change: dict[str, object], problem: str, tmp_path: Path
) -> None:
    folder = write_bundle(tmp_path / "bundle", ROLLING)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["graph"]["rolling"].update(change)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match=problem):
        load(folder)
