"""The parity gate: what it measures of a bundle, and what it lets through."""

import json

import numpy as np
import pytest
from support.gate import CONFIG, TEXTS, WEIGHTS, FakeSession, check

from gemma_export.errors import ParityError
from gemma_export.exporter.parity.gate import check_parity, sample_budget
from gemma_export.exporter.parity.plan import CHUNKS, make_plan
from gemma_export.exporter.parity.reference import Reference
from gemma_export.runtime.parity import BUDGETS

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("level", ["quick", "full"])
@pytest.mark.parametrize("all_logits", [False, True], ids=["last", "all"])
def test_a_bundle_that_is_right_passes(level, all_logits):
    report = check(FakeSession(all_logits=all_logits), level)
    assert report.reasons == ()
    assert report.verdict == "pass"
    assert report.figures.max_relative_error < 1e-5
    assert report.figures.top1_agreement == 1
    assert report.figures.reference_perplexity == pytest.approx(report.figures.bundle_perplexity, rel=1e-5)
    assert report.divergences() == ()
    assert all(layer.key_max < 1e-5 and layer.value_rms < 1e-5 for layer in report.layers)
    assert len(report.layers) == 3
    assert report.logits == ("all" if all_logits else "last")
    # Every step's logits were compared, or every token's.
    texts = sum(len(text.chunks) + text.tokens - sum(text.chunks) for text in report.texts)
    drafted = sum(len(continuation.tokens) for continuation in report.continuations)
    measured = sum(text.tokens for text in report.texts) if all_logits else texts
    assert report.figures.tokens == measured + drafted
    assert report.cost.bundle_steps == texts + drafted
    assert [phase.phase for phase in report.phases] == ["prefill", "decode", "continuation"]
    assert sum(phase.agreements for phase in report.phases) == report.figures.tokens


def test_steps_are_of_varied_sizes_and_reach_the_last_slot():
    session = FakeSession(48)
    report = check(session, "full")
    assert {1, 2, 5, 17} < set(session.calls)
    assert max(text.tokens for text in report.texts) == 48
    assert max(report.figures.positions) == 47
    assert "to the last slot" in report.texts[-1].name


def test_the_layers_are_read_once():
    runs = []

    class Counting(Reference):
        def run(self, sequences, **options):
            runs.append(len(sequences))
            return super().run(sequences, **options)

    check_parity(FakeSession(), Counting(CONFIG, WEIGHTS), TEXTS, level="quick", precision="fp32", bos=2)
    assert runs == [4 + 3]


def swap_first_two(session, monkeypatch, wrong):
    """Exchanges the two likeliest tokens where `wrong(cache)` says so."""
    step = session.step

    def swapped(tokens, cache):
        logits = step(tokens, cache).copy()
        if wrong(cache):
            first, second = logits[0, -1].argsort()[:-3:-1]
            logits[0, -1, [first, second]] = logits[0, -1, [second, first]]
        return logits

    monkeypatch.setattr(session, "step", swapped)


def test_another_most_likely_token_fails(monkeypatch):
    session = FakeSession()
    swap_first_two(session, monkeypatch, lambda cache: cache.length % 2)
    report = check(session, precision="bf16")
    assert "top-1 agreement" in " ".join(report.reasons)


def test_the_first_divergence_is_found_and_shown(monkeypatch):
    session = FakeSession()
    swap_first_two(session, monkeypatch, lambda cache: len(session.calls) == 3)
    letters = "".join(chr(0x100 + i) for i in range(300))
    report = check(session, decode=lambda tokens: "".join(letters[token] for token in tokens))
    assert [c.divergence is None for c in report.continuations] == [False, True, True]
    first = report.continuations[0]
    found = first.divergence
    assert (found.index, found.position) == (2, 11)
    assert found.bundle_token == first.tokens[2] != found.reference_token
    assert found.margin > 0
    assert found.error == pytest.approx(found.margin, rel=1e-3)
    assert not found.near_tie
    assert any("leaves the reference's at its token 3 by a margin" in reason for reason in report.reasons)
    text = first.text
    assert text.prompt == "".join(letters[token] for token in first.prompt_tokens)
    assert text.agreed + text.bundle + text.rest == "".join(letters[token] for token in first.tokens)
    assert text.reference == letters[found.reference_token]
    assert len(text.agreed) == 2


def test_a_near_tie_is_no_reason(monkeypatch):
    """Taking the other of two almost equal tokens is rounding in bf16, and a defect in fp32."""
    session = FakeSession()
    step = session.step

    def rounded(tokens, cache):
        logits = step(tokens, cache).copy()
        second, first = np.sort(logits[0, -1])[-2:]
        if first - second < 0.05:
            logits[0, -1][logits[0, -1] == first] = second - 1e-3
        return logits

    monkeypatch.setattr(session, "step", rounded)
    report = check(session, precision="bf16")
    assert report.reasons == ()
    assert report.divergences()
    for found in report.divergences():
        assert found.near_tie
        assert found.margin < 0.05
    report = check(session, precision="fp32")
    assert not any(found.near_tie for found in report.divergences())
    assert any("which is no near tie" in reason for reason in report.reasons)


def test_a_continuation_ends_at_a_stop_token():
    whole = check(FakeSession()).continuations[0].tokens
    done = []
    report = check(
        FakeSession(), stop=whole[3:4], on_event=lambda event: done.append((event.done, event.total))
    )
    assert report.continuations[0].tokens == whole[: whole.index(whole[3]) + 1]
    assert report.verdict == "pass"
    assert done[-1][0] == done[-1][1]
    assert [d for d, _ in done] == sorted(d for d, _ in done)


@pytest.mark.parametrize("slots", [1, 2, 15, 16, 17])
@pytest.mark.parametrize("level", ["quick", "full"])
def test_small_caches_are_filled_and_not_overrun(slots, level):
    report = check(FakeSession(slots), level)
    assert report.verdict == "pass"
    assert max(report.figures.positions) == slots - 1


@pytest.mark.parametrize("texts", [[], [[5, 6]], [[]]], ids=["none", "no beginning", "empty"])
def test_refuses_texts_that_mean_nothing(texts):
    with pytest.raises(ValueError, match="text"):
        check_parity(FakeSession(), Reference(CONFIG, WEIGHTS), texts, level="quick", precision="fp32", bos=2)


def test_another_vocabulary_is_an_error(monkeypatch):
    session = FakeSession()
    step = session.step
    monkeypatch.setattr(session, "step", lambda tokens, cache: step(tokens, cache)[..., :-4])
    with pytest.raises(ParityError, match="296 tokens, its reference of 300"):
        check(session)


def test_the_report_is_json_and_says_what_was_run():
    report = check(FakeSession(), names=list("abcdef"), subject="a model, fp32, cpu")
    read = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert read["verdict"] == "pass"
    assert [text["name"] for text in read["texts"]] == ["a", "b", "c", "d"]
    assert read["figures"]["tokens"] == report.figures.tokens
    assert read["subject"] == "a model, fp32, cpu"
    assert "torch" in read["versions"]
    summary = report.summary()
    assert summary["greedy_divergences"] == 0
    assert summary["tokens"] == report.figures.tokens
    json.dumps(summary, allow_nan=False)


def test_chunks_of_a_plan_add_up():
    plan = make_plan("full", [[2] * n for n in (1, 2, 3, 40, 300, 600)], list("abcdef"), 500, 2)
    assert [sum(text.steps) for text in plan.texts] == [1, 2, 3, 40, 300, 500, 500]
    assert all(min(text.steps) > 0 for text in plan.texts)
    assert {size for text in plan.texts for size in text.chunks} > set(CHUNKS)
    assert plan.texts[5].steps.count(1) >= 64


@pytest.mark.parametrize("level", ["quick", "full"])
def test_a_plan_goes_beyond_the_window_where_the_cache_does(level):
    texts = [[2] * n for n in (1, 40, 300)]

    def longest(slots: int, window: int | None) -> int:
        return max(sum(text.steps) for text in make_plan(level, texts, "abc", slots, 2, window).texts)

    without = longest(8000, None)
    assert longest(8000, 4096) == 4096 + 32 > without
    assert longest(4100, 4096) == 4100
    assert longest(4096, 4096) == without
    assert longest(8000, 64) == max(96, without)
    decoded = make_plan(level, texts, "abc", 8000, 2, 64).texts[-1].steps
    assert sum(decoded) - 64 >= 32
    assert set(decoded[-16:]) == {1}


@pytest.mark.parametrize(
    ("precision", "tokens", "allowed"),
    [("fp32", 150, 2), ("fp16", 150, 5), ("bf16", 150, 12), ("fp32", 10000, 18)],
)
def test_few_tokens_estimate_the_agreement_loosely(precision, tokens, allowed):
    # 99 % quantiles of Poisson distributions of 0.15, 1.5, 6 and 10.
    bound = sample_budget(BUDGETS[precision], tokens).top1_agreement
    assert round((1 - bound) * tokens) == allowed
