"""A turn of a bundle, on a clock that a step moves by one second per token."""

from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.small_bundle import write_bundle

from gemma_export.exporter.bench.bundle import STRETCH, run_turn
from gemma_export.exporter.bench.plan import real_tokens
from gemma_export.exporter.bench.values import Plan, Timing, Turn
from gemma_export.runtime.backend import Backend
from gemma_export.runtime.bundle import open_bundle
from gemma_export.runtime.onnxruntime import OnnxRuntimeBackend
from gemma_export.runtime.session import Session

LOADING = 1000.0
PLAN = Plan(prompts=(12, 20), depths=(0, 20, 40), tokens=4, chunk=8, threads=1)


@dataclass
class Ticking:
    """A backend whose steps take a second per token, and what it was asked for."""

    backend: Backend
    now: float = 0.0
    steps: list[tuple[list[int], int]] = field(default_factory=list)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backend, name)

    def run(self, input_ids: Any, position_ids: Any, cache: Any, tail: int = 1) -> Any:
        self.now += input_ids.shape[1]
        self.steps.append((input_ids[0].tolist(), int(position_ids[0, 0])))
        assert np.array_equal(position_ids[0], position_ids[0, 0] + np.arange(input_ids.shape[1]))
        return self.backend.run(input_ids, position_ids, cache, tail)

    def session(self, folder: Path) -> Session:
        self.now += LOADING
        return Session(open_bundle(folder), self)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("bench") / "small")


def run(folder: Path, plan: Plan) -> tuple[Turn, Ticking]:
    ticking = Ticking(OnnxRuntimeBackend(open_bundle(folder), 1))
    return run_turn(lambda: ticking.session(folder), plan, lambda: ticking.now), ticking


def test_times_are_those_of_the_steps_and_of_nothing_else(folder: Path) -> None:
    turn, _ = run(folder, PLAN)
    assert turn.load == LOADING
    assert turn.prefill == (Timing(12, 12, 12.0), Timing(20, 20, 20.0))
    assert turn.decode == (Timing(0, 4, 4.0), Timing(20, 4, 4.0), Timing(40, 4, 4.0))
    assert turn.choosing == 0
    assert turn.first_token is not None
    assert turn.first_token.seconds == turn.first_token.tokens
    # Decoding a text and encoding it again may give another number of tokens.
    assert abs(turn.first_token.tokens - 12) <= 2


def test_every_step_runs_the_passages_where_they_stand(folder: Path) -> None:
    _, ticking = run(folder, PLAN)
    text = real_tokens(ticking.session(folder).tokenizer, 64)
    prompts = [(ids, start) for ids, start in ticking.steps if len(ids) > 1]
    assert len(prompts) > 5
    assert all(len(ids) <= PLAN.chunk for ids, _ in prompts)
    # The first is the text that is waited for, which is encoded on its own.
    assert all(ids == text[start : start + len(ids)] for ids, start in prompts[1:])
    single = [start for ids, start in ticking.steps if len(ids) == 1]
    for depth in PLAN.depths:
        # One that is not measured, then those that are.
        assert [depth, *range(depth, depth + PLAN.tokens)] in [
            single[i : i + PLAN.tokens + 1] for i in range(len(single))
        ]


def test_a_depth_within_what_was_decoded_before_begins_again(folder: Path) -> None:
    plan = replace(PLAN, prompts=(), depths=(20, 21))
    turn, ticking = run(folder, plan)
    assert [timing.at for timing in turn.decode] == [20, 21]
    assert [start for _, start in ticking.steps].count(0) >= 3
    assert turn.prefill == ()


def test_the_cache_is_filled_to_its_last_slot(folder: Path) -> None:
    turn, ticking = run(folder, replace(PLAN, prompts=(64,), depths=(60,)))
    assert turn.decode == (Timing(60, 4, 4.0),)
    assert max(start for ids, start in ticking.steps if len(ids) == 1) == 63


def test_memory_is_read_before_between_and_after_the_tokens(folder: Path) -> None:
    ticking = Ticking(OnnxRuntimeBackend(open_bundle(folder), 1))
    asked: list[float] = []

    def rate() -> float:
        asked.append(ticking.now)
        ticking.now += 1000
        return 4.0 if len(asked) % 2 else 12.0

    plan = replace(PLAN, prompts=(), depths=(5,), tokens=2 * STRETCH + 1)
    turn = run_turn(lambda: ticking.session(folder), plan, lambda: ticking.now, rate)
    decoded = 2 * STRETCH + 1
    assert turn.decode == (Timing(5, decoded, decoded, read=6.0),)  # As much read at 4 as at 12.
    assert turn.choosing == 0
    assert [later - sooner - 1000 for sooner, later in pairwise(asked)] == [STRETCH, STRETCH, 1]


def test_tokens_per_second() -> None:
    assert Timing(512, 32, 4.0).per_second == 8
