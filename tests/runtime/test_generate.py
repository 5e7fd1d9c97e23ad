import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any, get_type_hints

import numpy as np
import pytest

from gemma_export.errors import ContextFullError, GemmaExportError, PromptError, UsageError
from gemma_export.runtime.options import GenerationKeywords, GenerationOptions
from gemma_export.runtime.session import Session

PROMPT = [2, 651, 9, 300, 1200]
TEXT = "Once upon a time"


def greedy_by_full_passes(session: Session, prompt: list[int], count: int) -> list[int]:
    """The oracle: every token from a pass over everything before it, without a cache."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(session.logits(tokens)[-1].argmax()))
    return tokens[len(prompt) :]


def test_greedy_is_the_arg_max_of_full_passes(session: Session) -> None:
    expected = greedy_by_full_passes(session, PROMPT, 20)
    assert len(set(expected)) > 10  # text that wanders, or the test would see nothing
    assert session.generate_tokens(PROMPT, max_new_tokens=20, stop_tokens=()) == expected


@pytest.mark.parametrize("chunk", [1, 4, 5, 6, 7, 256])
def test_the_prefill_chunk_changes_nothing(session: Session, last_session: Session, chunk: int) -> None:
    expected = session.generate_tokens(PROMPT, max_new_tokens=16, stop_tokens=())
    for one in (session, last_session):
        assert one.generate_tokens(PROMPT, max_new_tokens=16, stop_tokens=(), prefill_chunk=chunk) == expected


def test_text_is_the_decoded_tokens(session: Session) -> None:
    generation = session.generate(TEXT, max_new_tokens=24, stop_tokens=())
    assert str(generation) == session.tokenizer.decode(generation.tokens)
    prompt = session.tokenizer.encode(TEXT)
    assert list(generation.tokens) == session.generate_tokens(prompt, max_new_tokens=24, stop_tokens=())


def test_iterating_streams_and_can_be_repeated(session: Session) -> None:
    generation = session.generate(TEXT, max_new_tokens=8, stop_tokens=())
    pieces = iter(generation)
    first = next(pieces)
    assert "not finished" in repr(generation)
    rest = list(pieces)
    assert list(generation) == [first, *rest]
    assert generation.text == str(generation) == first + "".join(rest)
    assert len(rest) > 3
    assert "8 tokens (length)" in repr(generation)


def test_two_readers_at_once(session: Session) -> None:
    generation = session.generate(TEXT, max_new_tokens=8, stop_tokens=())
    both = list(zip(generation, generation, strict=True))
    assert all(a == b for a, b in both)


def test_an_attribute_runs_it_to_its_end(session: Session) -> None:
    generation = session.generate(TEXT, max_new_tokens=4, stop_tokens=())
    assert generation.finish_reason == "length"
    assert len(generation.tokens) == 4


def test_stats(session: Session) -> None:
    generation = session.generate(TEXT, max_new_tokens=4, stop_tokens=())
    stats = generation.stats
    assert stats.prefill_tokens == session.count_tokens(TEXT)
    assert stats.new_tokens == 4
    assert stats.prefill_seconds > 0
    assert stats.decode_seconds > 0
    assert stats.decode_tokens_per_second == pytest.approx(3 / stats.decode_seconds)
    assert session.generate(TEXT, max_new_tokens=1).stats.decode_tokens_per_second == 0


def test_nothing_runs_before_it_is_read(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session._backend, "run", None)
    session.generate(TEXT)


def test_a_stop_token_ends_and_is_not_shown(session: Session) -> None:
    free = session.generate_tokens(PROMPT, max_new_tokens=8, stop_tokens=())
    stop = free[4]
    assert stop not in free[:4]
    completion = session.generate_tokens_batch([PROMPT], max_new_tokens=8, stop_tokens=[stop])[0]
    assert completion.tokens == tuple(free[:4])
    assert completion.finish_reason == "stop"


def test_a_stop_token_at_once(session: Session) -> None:
    first = session.generate_tokens(PROMPT, max_new_tokens=1, stop_tokens=())
    completion = session.generate_tokens_batch([PROMPT], stop_tokens=first)[0]
    assert (completion.tokens, completion.text, completion.finish_reason) == ((), "", "stop")


def test_the_bundle_names_the_stop_tokens(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    free = session.generate_tokens(PROMPT, max_new_tokens=3, stop_tokens=())
    tokens = dataclasses.replace(session.manifest.tokens, stop=(free[2],))
    manifest = dataclasses.replace(session.manifest, tokens=tokens)
    monkeypatch.setattr(session, "bundle", dataclasses.replace(session.bundle, manifest=manifest))
    assert session.generate_tokens(PROMPT, max_new_tokens=8) == free[:2]


def test_a_stop_string_across_tokens(session: Session) -> None:
    pieces = list(session.generate(TEXT, max_new_tokens=12, stop_tokens=()))
    text = "".join(pieces)
    middle = len(pieces[0]) + len(pieces[1])
    stop = text[middle - 1 : middle + 2]
    generation = session.generate(TEXT, max_new_tokens=12, stop_tokens=(), stop=[stop])
    shown = list(generation)
    assert "".join(shown) == text[: text.index(stop)]
    assert generation.finish_reason == "stop"
    assert len(generation.tokens) < 12


def test_a_prompt_that_fills_the_cache_gives_one_token(session: Session) -> None:
    prompt = [2, *range(300, 363)]
    assert len(prompt) == session.max_length
    completion = session.generate_tokens_batch([prompt], stop_tokens=())[0]
    assert completion.tokens == (int(session.logits(prompt)[-1].argmax()),)
    assert completion.finish_reason == "context"


@pytest.mark.parametrize("spare", [1, 2, 5])
def test_generation_ends_at_the_last_slot(session: Session, spare: int) -> None:
    prompt = [2, *range(300, 363)][:-spare]
    completion = session.generate_tokens_batch([prompt], stop_tokens=())[0]
    assert completion.finish_reason == "context"
    assert list(completion.tokens) == greedy_by_full_passes(session, prompt, spare + 1)


def test_length_comes_before_context(session: Session) -> None:
    prompt = [2, *range(300, 363)]
    assert session.generate_tokens_batch([prompt], max_new_tokens=1)[0].finish_reason == "length"


def test_a_prompt_that_does_not_fit_runs_nothing(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session._backend, "run", None)
    with pytest.raises(ContextFullError, match="65 tokens do not fit into the bundle's context of 64"):
        session.generate_tokens([5] * 65)
    with pytest.raises(ContextFullError):
        session.generate("long " * 70)
    with pytest.raises(ContextFullError):
        session.generate_tokens_batch([PROMPT, [5] * 65])


RAGGED = [PROMPT, [2], [2, *range(400, 440)], [2, 77, 78]]


def test_each_row_of_a_ragged_batch_gets_what_it_gets_alone(session: Session, last_session: Session) -> None:
    alone = [session.generate_tokens(prompt, max_new_tokens=20, stop_tokens=()) for prompt in RAGGED]
    for one in (session, last_session):
        batch = one.generate_tokens_batch(RAGGED, max_new_tokens=20, stop_tokens=())
        assert [list(row.tokens) for row in batch] == alone


def test_rows_of_a_batch_end_each_for_itself(session: Session) -> None:
    prompts = [[2, *range(400, 460)], PROMPT, [2, 77]]
    free = [session.generate_tokens(prompt, max_new_tokens=15, stop_tokens=()) for prompt in prompts]
    stop = free[1][5]
    rows = session.generate_tokens_batch(prompts, max_new_tokens=15, stop_tokens=[stop])
    assert [row.finish_reason for row in rows] == ["context", "stop", "length"]
    assert list(rows[0].tokens) == free[0]
    assert list(rows[1].tokens) == free[1][: free[1].index(stop)]
    assert list(rows[2].tokens) == free[2]


def test_logits_of_a_ragged_batch_are_those_of_each_row(session: Session) -> None:
    cache = session.new_cache(batch=len(RAGGED))
    for row, prompt in enumerate(RAGGED):
        session.step([prompt], cache.row(row))
    together = session.step([[9]] * len(RAGGED), cache)
    assert cache.lengths.tolist() == [len(prompt) + 1 for prompt in RAGGED]
    for row, prompt in enumerate(RAGGED):
        np.testing.assert_allclose(together[row, 0], session.logits([*prompt, 9])[-1], atol=1e-4)


def test_a_batch_of_texts(session: Session) -> None:
    texts = [TEXT, "A", "🙂 漢"]
    rows = session.generate_batch(texts, max_new_tokens=6, stop_tokens=())
    assert [str(row) for row in rows] == [
        str(session.generate(text, max_new_tokens=6, stop_tokens=())) for text in texts
    ]


def test_no_prompt(session: Session) -> None:
    with pytest.raises(UsageError, match="no prompt"):
        session.generate_batch([])
    with pytest.raises(PromptError):
        session.generate("")


def test_a_seed_repeats_and_another_differs(session: Session) -> None:
    def sample(seed: int) -> list[int]:
        return session.generate_tokens(PROMPT, max_new_tokens=12, temperature=2.0, top_k=50, seed=seed)

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)


def test_sampling_in_a_batch_is_sampling_alone(session: Session) -> None:
    options = GenerationKeywords(
        max_new_tokens=10, temperature=1.5, top_p=0.9, repetition_penalty=1.2, seed=3, stop_tokens=()
    )
    alone = [session.generate_tokens(prompt, **options) for prompt in RAGGED]
    assert [list(row.tokens) for row in session.generate_tokens_batch(RAGGED, **options)] == alone


def interrupt_at(session: Session, monkeypatch: pytest.MonkeyPatch, call: int, when: str) -> None:
    """Raises KeyboardInterrupt in one call of the backend, before or after the graph has run."""
    run, calls = session._backend.run, itertools.count()

    def interrupted(*arguments: Any) -> Any:
        if next(calls) != call:
            return run(*arguments)
        if when == "after":
            run(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(session._backend, "run", interrupted)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("call", [0, 1, 2, 5])
def test_an_interrupt_leaves_the_cache_consistent(
    session: Session, monkeypatch: pytest.MonkeyPatch, call: int, when: str
) -> None:
    chat = session.chat()
    answer = chat.say("Hi there", max_new_tokens=9, stop_tokens=(), prefill_chunk=5)
    with monkeypatch.context() as patch:
        interrupt_at(session, patch, call, when)
        with pytest.raises(KeyboardInterrupt):
            str(answer)
    assert answer.finish_reason == "interrupted"
    assert str(answer) == answer.text
    second = chat.say("Go on", max_new_tokens=5, stop_tokens=())
    read = chat.tokens
    assert list(second.tokens) == session.generate_tokens(read, max_new_tokens=5, stop_tokens=())


def test_logits_that_are_not_numbers_end_it(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = np.full((1, 1, 2048), np.nan, np.float32)
    monkeypatch.setattr(session._backend, "run", lambda *_: nothing)
    with pytest.raises(GemmaExportError, match="largest logit is nan"):
        session.generate_tokens(PROMPT)


def bad_options() -> Iterator[tuple[str, Any]]:
    yield from {
        "max_new_tokens": 0,
        "prefill_chunk": 0,
        "temperature": -1.0,
        "top_k": -1,
        "top_p": 0.0,
        "repetition_penalty": 0.0,
        "seed": -1,
    }.items()
    yield "temperature", float("nan")
    yield "temperature", float("inf")
    yield "top_p", 1.5
    yield "stop", "text"
    yield "stop", [""]


@pytest.mark.parametrize(("name", "value"), list(bad_options()), ids=str)
def test_an_option_out_of_range_is_named(session: Session, name: str, value: Any) -> None:
    with pytest.raises(UsageError, match=f"^{name} is "):
        session.generate(TEXT, **{name: value})


def test_an_unknown_option(session: Session) -> None:
    with pytest.raises(TypeError, match="max_tokens"):
        session.generate(TEXT, max_tokens=3)  # type: ignore[call-arg]


def test_keywords_are_the_options() -> None:
    fields = {field.name for field in dataclasses.fields(GenerationOptions)}
    assert set(get_type_hints(GenerationKeywords)) == fields
