"""A turn of transformers, on a clock that only its steps move."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from gemma_export.exporter.bench import hugging_face
from gemma_export.exporter.bench.plan import real_tokens
from gemma_export.exporter.bench.values import Plan, Timing
from gemma_export.runtime.session import load

PLAN = Plan(prompts=(12, 20), depths=(0, 20, 40), tokens=4, chunk=8, threads=1)


class Stepped:
    """A step that takes a second per token, and what it ran and said."""

    def __init__(self) -> None:
        self.now = 0.0
        self.steps: list[tuple[list[int], int, int]] = []
        self._step = hugging_face._step

    def __call__(self, model: Any, tokens: Sequence[int], cache: Any) -> tuple[int, Any]:
        self.now += len(tokens)
        held = 0 if cache is None else cache.get_seq_length()
        token, cache = self._step(model, tokens, cache)
        assert cache.get_seq_length() == held + len(tokens)
        self.steps.append((list(tokens), held, token))
        return token, cache


def test_a_turn(tiny_bundle: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stepped = Stepped()
    monkeypatch.setattr(hugging_face, "_step", stepped)
    turn = hugging_face.run_turn(tiny_bundle, tiny_checkpoint, PLAN, lambda: stepped.now)
    assert turn.load == 0
    assert turn.first_token == Timing(0, 12, 12.0)
    assert turn.prefill == (Timing(12, 12, 12.0), Timing(20, 20, 20.0))
    assert turn.decode == tuple(Timing(depth, 4, 4.0) for depth in PLAN.depths)
    text = real_tokens(load(tiny_bundle).tokenizer, 64)
    prompts = [tokens for tokens, held, _ in stepped.steps if held == 0]
    assert prompts == [text[:n] for n in (12, 1, 12, 20, 40)]
    # What is decoded is what the model says: each step runs the token of the one before, behind all others.
    last = stepped.steps[-5:]
    assert [held for _, held, _ in last] == [0, 40, 41, 42, 43]
    assert [tokens for tokens, _, _ in last[1:]] == [[token] for _, _, token in last[:-1]]
