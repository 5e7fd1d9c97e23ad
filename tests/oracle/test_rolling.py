"""Bundles whose local caches roll, against `transformers` and against bundles that keep every position."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from support.oracle import (
    RELATIVE_ERROR,
    assert_greedy,
    oracle_logits,
    random_tokens,
    relative_error,
    run_in_steps,
)

from gemma_export.errors import OverwrittenError, UsageError
from gemma_export.exporter.bundle import describe_files, write_manifest
from gemma_export.exporter.compile import compile_bundle
from gemma_export.exporter.engines.options import EngineOptions
from gemma_export.exporter.events import ignore
from gemma_export.exporter.parity.measure import measure_bundle
from gemma_export.exporter.parity.report import ParityReport
from gemma_export.exporter.pipeline import BuildResult
from gemma_export.runtime.bundle import Manifest
from gemma_export.runtime.session import Session, load

pytestmark = pytest.mark.slow

WINDOW, CHUNK, ROLLING_SLOTS = 64, 64, 128
DEPTH, SLOTS = 600, 640

BuildOnce = Callable[..., BuildResult]
Checkpoint = Callable[[str], Path]
Graph = onnx.GraphProto
Logits = npt.NDArray[np.float32]


@pytest.fixture
def oracle(oracle_of: Callable[[str], Any]) -> Any:
    return oracle_of("gemma2")


@pytest.fixture
def make(build_once: BuildOnce, checkpoint_of: Checkpoint) -> BuildOnce:
    def made(**options: Any) -> BuildResult:
        wanted = {"target": "onnx", "logits": "all", "max_length": SLOTS, **options}
        return build_once(checkpoint=checkpoint_of("gemma2"), **wanted)

    return made


@pytest.fixture
def rolling(make: BuildOnce) -> Session:
    return load(make(local_cache="rolling").path, threads=1)


@pytest.fixture
def full(make: BuildOnce) -> Session:
    return load(make().path, threads=1)


@pytest.mark.parametrize(
    "sizes",
    [
        (DEPTH,),
        (1,) * DEPTH,
        (CHUNK,) * (DEPTH // CHUNK) + (DEPTH % CHUNK,),
        (37,) * (DEPTH // 37) + (DEPTH % 37,),
        (WINDOW - 1, 1, 1, CHUNK - 2, 2, CHUNK, CHUNK + 1, 63, DEPTH - 321),
    ],
    ids=["one step", "ones", "chunks", "odd", "around the window and the wrap"],
)
def test_every_position_past_several_wraps(sizes: tuple[int, ...], rolling: Session, oracle: Any) -> None:
    tokens = random_tokens(DEPTH)
    assert (
        relative_error(oracle_logits(oracle, tokens), run_in_steps(rolling, tokens, sizes)) < RELATIVE_ERROR
    )


@pytest.mark.parametrize("end", [WINDOW, ROLLING_SLOTS, 4 * ROLLING_SLOTS])
@pytest.mark.parametrize("beyond", [-1, 0, 1])
def test_the_greedy_answer_to_a_prompt(end: int, beyond: int, rolling: Session, oracle: Any) -> None:
    prompt = random_tokens(end + beyond, seed=end + beyond)
    for chunk in (None, 23):
        options = {} if chunk is None else {"prefill_chunk": chunk}
        answer = rolling.generate_tokens(prompt, max_new_tokens=24, stop_tokens=(), **options)
        assert len(answer) == 24
        assert_greedy(oracle, prompt, answer)


def test_rows_of_other_lengths_roll_alone(rolling: Session, oracle: Any) -> None:
    prompts = [random_tokens(length, seed=length) for length in (30, 100, 127, 500)]
    answers = rolling.generate_tokens_batch(prompts, max_new_tokens=40, stop_tokens=())
    for prompt, answer in zip(prompts, answers, strict=True):
        assert len(answer.tokens) == 40
        assert_greedy(oracle, prompt, answer.tokens)


def test_rows_that_are_stepped_together(rolling: Session, full: Session) -> None:
    """Several tokens of several rows at once, each row with a wrap of its own."""
    lengths, steps = (5, 120, 250), random_tokens(3 * 90, seed=3)
    found = []
    for session in (rolling, full):
        cache = session.new_cache(len(lengths))
        for row, length in enumerate(lengths):
            session.step([random_tokens(length, seed=length)], cache.row(row))
        rows = np.array(steps).reshape(3, 90)
        found.append(
            np.concatenate([session.step(rows[:, :33], cache), session.step(rows[:, 33:], cache)], 1)
        )
    assert relative_error(found[1], found[0]) < RELATIVE_ERROR


def test_a_dialogue_goes_on_where_it_was(rolling: Session, full: Session) -> None:
    said = ["Speak of the sea. " * 6, "And of the land.", "Well then: " + "and so on, " * 30]
    conversations = rolling.chat(), full.chat()
    answers = [[talk.say(text, max_new_tokens=20).tokens for text in said] for talk in conversations]
    assert len(conversations[0].tokens) > 2 * ROLLING_SLOTS
    assert answers[0] == answers[1]


def test_a_draft_that_is_not_taken_leaves_nothing(rolling: Session) -> None:
    prompt = (random_tokens(40, seed=9) * 10)[:250]  # What repeats itself is drafted, and mostly refused.
    plain = rolling.generate_tokens(prompt, max_new_tokens=150, stop_tokens=())
    drafted = rolling.generate_tokens(prompt, max_new_tokens=150, stop_tokens=(), draft_tokens=6)
    assert drafted == plain


def test_going_back(rolling: Session, full: Session) -> None:
    tokens = random_tokens(DEPTH)
    cache, other = rolling.new_cache(), full.new_cache()
    for session, filled in ((rolling, cache), (full, other)):
        session.step([tokens[:300]], filled)
    # 300 positions are written and 128 are held: the window of position 235 begins at 172.
    assert [cache.reusable(length) for length in (300, 235, 234, 0)] == [300, 235, 0, 0]
    for filled in (cache, other):
        filled.truncate(235)
    again = random_tokens(100, seed=8)
    assert relative_error(full.step([again], other), rolling.step([again], cache)) < RELATIVE_ERROR
    with pytest.raises(OverwrittenError, match="cannot go back to its first 234"):
        cache.truncate(234)
    cache.truncate(0)
    np.testing.assert_allclose(
        rolling.step([tokens[:200]], cache)[0], run_in_steps(rolling, tokens[:200], (200,)), rtol=0, atol=1e-6
    )


def test_engines_take_no_longer_steps(make: BuildOnce, tmp_path: Path) -> None:
    bundle = make(local_cache="rolling", precision="fp16").path
    options = EngineOptions(prefill_chunk=CHUNK + 1)
    with pytest.raises(UsageError, match=r"more than the 64 tokens that the rolling cache.*Give at most 64"):
        compile_bundle(bundle, "rtx", options, tmp_path / "compiled")


def test_what_it_saves(make: BuildOnce) -> None:
    rolling, full = make(local_cache="rolling").manifest, make().manifest
    found = rolling.graph.rolling
    assert found is not None
    assert (found.layers, found.window, found.chunk, found.slots) == ((0,), WINDOW, CHUNK, ROLLING_SLOTS)
    assert found.saved_per_row == full.bytes.cache_per_row - rolling.bytes.cache_per_row
    # One of two layers keeps 128 of 640 positions: 2 heads of 16 floats, keys and values.
    assert found.saved_per_row == (SLOTS - ROLLING_SLOTS) * 2 * 2 * 16 * 4
    assert Manifest.from_json(rolling.to_json()) == rolling


# The gate refuses what is wrong


def of_type(graph: Graph, op_type: str) -> list[onnx.NodeProto]:
    found = [node for node in graph.node if node.op_type == op_type]
    assert found
    return found


def a_window_of_one_more(graph: Graph) -> None:
    (after,) = of_type(graph, "Greater")
    after.op_type = "GreaterOrEqual"


def a_window_of_one_less(graph: Graph) -> None:
    (after,) = of_type(graph, "Greater")
    (begin,) = [node for node in of_type(graph, "Sub") if node.output[0] == after.input[1]]
    take_number(graph, begin, WINDOW - 1)


def take_number(graph: Graph, node: onnx.NodeProto, number: int) -> None:
    """Gives a node a second operand of its own; others may read the one that it had."""
    node.input[1] = f"number_{number}"
    graph.initializer.append(onnx.numpy_helper.from_array(np.array(number), node.input[1]))


def what_was_never_written_is_seen(graph: Graph) -> None:
    """Without held >= 0, which stands last."""
    both = of_type(graph, "And")[-1]
    both.op_type = "Identity"
    del both.input[1:]


def a_write_that_begins_again_too_soon(graph: Graph) -> None:
    """The last slot is never written, and the first ones a position too early."""
    (write,) = [node for node in of_type(graph, "Mod") if node.input[0] == "position_ids"]
    take_number(graph, write, ROLLING_SLOTS - 1)


def a_mask_that_begins_again_too_soon(graph: Graph) -> None:
    (held,) = [node for node in of_type(graph, "Mod") if node.input[0] != "position_ids"]
    take_number(graph, held, ROLLING_SLOTS - 1)


@pytest.mark.parametrize(
    "spoil",
    [
        a_window_of_one_more,
        a_window_of_one_less,
        what_was_never_written_is_seen,
        a_write_that_begins_again_too_soon,
        a_mask_that_begins_again_too_soon,
    ],
    ids=lambda spoil: spoil.__name__,
)
def test_a_wrong_rolling_cache_is_refused(
    spoil: Callable[[Graph], None], make: BuildOnce, tmp_path: Path
) -> None:
    bundle = Path(shutil.copytree(make(local_cache="rolling", logits="last").path, tmp_path / "bundle"))
    assert measure(bundle).verdict == "pass"
    model = onnx.load(bundle / "model.onnx", load_external_data=False)
    spoil(model.graph)
    onnx.save(model, bundle / "model.onnx")
    report = measure(bundle)
    assert report.verdict == "fail"
    assert report.reasons


def measure(bundle: Path) -> ParityReport:
    """Gives the bundle a manifest that fits its files, and holds it against its checkpoint."""
    manifest = Manifest.from_json((bundle / "manifest.json").read_text())
    write_manifest(bundle, replace(manifest, files=describe_files(bundle, {})))
    return measure_bundle(
        bundle, checkpoint=None, reference="eager", text=None, level="quick", listener=ignore
    )
