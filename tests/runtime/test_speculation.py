"""Drafts change how many steps a text takes, and nothing of the text."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_export.errors import UsageError
from gemma_export.runtime import generate
from gemma_export.runtime.session import Session, load
from gemma_export.runtime.speculation import LONGEST_DRAFT, Drafter

PROMPTS = [[2, 651, 9, 300], [2, 8, 8, 8, 8, 8, 8], [2, 1200, 44, 9, 1200, 44, 9, 1200]]

TEXTS = st.lists(st.integers(0, 2), min_size=1, max_size=40)


def continued(tokens: Sequence[int]) -> list[int]:
    """What followed the longest match of the last 4, 3 or 2 tokens, at its latest place; by brute force."""
    end = len(tokens)
    for size in (4, 3, 2):
        for stop in range(end - 1, size - 1, -1):
            if size <= end and list(tokens[stop - size : stop]) == list(tokens[end - size :]):
                round_ = list(tokens[stop:])
                return (round_ * LONGEST_DRAFT)[:LONGEST_DRAFT]
    return []


@given(TEXTS)
def test_a_draft_is_what_followed_before(tokens: list[int]) -> None:
    expected = continued(tokens)
    draft = Drafter(tokens, LONGEST_DRAFT).draft(LONGEST_DRAFT)
    assert draft == expected[: len(draft)]
    assert bool(draft) == bool(expected)


@given(TEXTS, TEXTS)
def test_a_text_that_grew_is_looked_up_as_a_whole(tokens: list[int], more: list[int]) -> None:
    drafter = Drafter(tokens, LONGEST_DRAFT)
    for token in more:
        drafter.draft(1)
        tokens.append(token)
    draft = drafter.draft(LONGEST_DRAFT)
    assert draft == continued(tokens)[: len(draft)]


@given(TEXTS, st.integers(0, 5), st.integers(-1, 5))
def test_a_draft_has_no_more_than_there_is_room_for(tokens: list[int], longest: int, room: int) -> None:
    assert len(Drafter(tokens, longest).draft(room)) <= max(0, min(longest, room))


def test_a_draft_is_as_long_as_pays() -> None:
    tokens = [1, 2, 3, 4] * 3
    drafter = Drafter(tokens, 7)

    def lengths(steps: int, follow: Callable[[int], list[int]]) -> list[int]:
        found = []
        for step in range(steps):
            found.append(len(drafter.draft(100)))
            tokens.extend(follow(step))
        return found

    # What repeats goes on to do so: a step gives the draft and a token more.
    growing = lengths(12, lambda step: [tokens[-4 + i % 4] for i in range(8)])
    assert growing == sorted(growing)
    assert growing[0] < growing[-1] == 7
    # After 5, 6 comes something new each time: soon nothing is verified, and nothing is paid.
    tokens += [5, 6]
    shrinking = lengths(30, lambda step: [100 + step, 5, 6])
    assert shrinking[-10:] == [0] * 10
    assert max(shrinking) > 0
    # What is not verified is still compared with what comes, so that drafts come back when they hold.
    back = lengths(40, lambda step: [7, 5, 6])
    assert back[0] == 0
    assert back[-1] == 7


class Prophet:
    """Drafts what is known to come, with mistakes where it is told to make them."""

    plain: Sequence[list[int]]
    plan: Sequence[tuple[int, int]]

    def __init__(self, tokens: list[int], longest: int) -> None:
        self._tokens = tokens
        self._truth = next(truth for truth in self.plain if truth[: len(tokens)] == tokens)
        self._steps = iter([*self.plan, *[(0, 0)] * 100][len(tokens) % 3 :])

    def draft(self, room: int) -> list[int]:
        length, wrong = next(self._steps)
        draft = self._truth[len(self._tokens) :][: max(0, min(length, room))]
        return [token + (i == wrong) for i, token in enumerate(draft)]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=12), st.sampled_from([0.0, 0.9]))
def test_whatever_is_drafted_the_text_is_the_same(
    session: Session, plan: list[tuple[int, int]], temperature: float
) -> None:
    options: dict[str, Any] = {"max_new_tokens": 20, "stop_tokens": (), "temperature": temperature, "seed": 3}
    plain = session.generate_tokens_batch(PROMPTS, **options)
    Prophet.plain = [[*prompt, *row.tokens] for prompt, row in zip(PROMPTS, plain, strict=True)]
    Prophet.plan = plan
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generate, "Drafter", Prophet)
        # Rows of a batch take different numbers of tokens from a step.
        assert session.generate_tokens_batch(PROMPTS, **options) == plain
        for prompt, row in zip(PROMPTS, plain, strict=True):
            assert session.generate_tokens_batch([prompt], **options) == [row]


@pytest.fixture(scope="module")
def tiny(tiny_bundle: Path) -> Session:
    return load(tiny_bundle, threads=1)


@pytest.fixture
def steps(tiny: Session, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Tokens and asked-for logits of every step that is run."""
    sizes: list[tuple[int, int]] = []
    run: Callable[..., Any] = tiny._backend.run

    def noted(ids: Any, positions: Any, cache: Any, tail: int = 1) -> Any:
        sizes.append((ids.shape[1], tail))
        return run(ids, positions, cache, tail)

    monkeypatch.setattr(tiny._backend, "run", noted)
    return sizes


TEXT = "ROMEO:\nI am a man that is a man.\n\nJULIET:\n"


def test_text_that_repeats_takes_fewer_steps(tiny: Session, steps: list[tuple[int, int]]) -> None:
    options: dict[str, Any] = {"max_new_tokens": 120, "stop_tokens": ()}
    plain = tiny.generate(TEXT, **options)
    assert plain.stats.draft_tokens == plain.stats.accepted_tokens == 0
    assert len(steps) == 120
    steps.clear()
    drafted = tiny.generate(TEXT, draft_tokens=7, **options)
    assert drafted.tokens == plain.tokens
    assert str(drafted) == str(plain)
    assert "".join(drafted) == str(plain)
    stats = drafted.stats
    assert stats.draft_tokens == sum(tokens - 1 for tokens, _ in steps[1:])
    assert 0 < stats.accepted_tokens <= stats.draft_tokens
    assert len(steps) == stats.new_tokens - stats.accepted_tokens
    assert len(steps) < 80
    assert steps[0][1] == 1  # of a prompt only the last token's logits are wanted
    assert all(tokens == tail <= 8 for tokens, tail in steps[1:])


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_the_end_is_where_it_is_without_drafts(tiny: Session, temperature: float, penalty: float) -> None:
    """Stop tokens, stop strings and the last slot, each in the middle of a draft or not."""
    options: dict[str, Any] = {"temperature": temperature, "repetition_penalty": penalty, "seed": 5}
    free = tiny.generate_tokens(tiny.tokenizer.encode(TEXT), max_new_tokens=60, stop_tokens=(), **options)
    for at in (1, 31, 32, 59):
        for ends in (
            {"stop_tokens": (free[at],)},
            {"stop_tokens": (), "stop": [tiny.tokenizer.decode(free[at - 1 : at + 1])]},
            {"stop_tokens": (), "max_new_tokens": at},
        ):
            plain, drafted = (
                tiny.generate(TEXT, draft_tokens=count, **{"max_new_tokens": 60, **options, **ends})
                for count in (0, 7)
            )
            assert (drafted.text, drafted.tokens) == (plain.text, plain.tokens)
            assert drafted.finish_reason == plain.finish_reason


def test_a_draft_ends_at_the_last_slot(session: Session) -> None:
    """The small bundle has 64 slots; a text of one token over and over is drafted to the last of them."""
    for length in (58, 60, 61, 62, 63, 64):
        prompt = [2, *[7] * (length - 1)]
        plain, drafted = (
            session.generate_tokens_batch([prompt, prompt[:9]], draft_tokens=count, stop_tokens=())
            for count in (0, 7)
        )
        assert drafted == plain
        assert plain[0].finish_reason == "context"


def test_a_dialogue_goes_on_behind_drafts(tiny: Session) -> None:
    answers = []
    for count in (0, 7):
        chat = tiny.chat()
        said = [
            str(chat.say(text, max_new_tokens=30, draft_tokens=count)) for text in ("Good day.", "Good day.")
        ]
        answers.append((said, chat.tokens))
    assert answers[0] == answers[1]


def test_a_bundle_that_cannot_verify_refuses_drafts(last_session: Session) -> None:
    for write in (last_session.generate, last_session.chat().say):
        with pytest.raises(UsageError, match="logits of the last token only"):
            write("Once", draft_tokens=4)


@pytest.mark.parametrize("count", [-1, LONGEST_DRAFT + 1])
def test_impossible_drafts(session: Session, count: int) -> None:
    with pytest.raises(UsageError, match="draft_tokens is"):
        session.generate("Once", draft_tokens=count)


def test_the_tail_is_the_end_of_all_logits(tiny: Session, tiny_bundle_all: Path) -> None:
    tokens = tiny.tokenizer.encode(TEXT)
    expected = load(tiny_bundle_all, threads=1).logits(tokens)
    # Both are products of all rows; the cache is longer in one, and what it masks adds nothing.
    np.testing.assert_allclose(tiny.logits(tokens), expected, rtol=0, atol=1e-5)
