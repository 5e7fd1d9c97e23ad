"""The second generation's bundles against `transformers`, beyond the window and around its end."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from support.oracle import (
    RELATIVE_ERROR,
    assert_greedy,
    load_oracle,
    oracle_greedy,
    oracle_logits,
    random_tokens,
    relative_error,
    run_in_steps,
)

from gemma_export.calibration.passages import DIALOGUE, GERMAN, NUMBERS, PROSE
from gemma_export.exporter.config import tiny_folder
from gemma_export.exporter.events import ignore
from gemma_export.exporter.parity.measure import measure_bundle
from gemma_export.exporter.pipeline import BuildResult, build
from gemma_export.exporter.request import BuildRequest
from gemma_export.runtime.session import Session, load

pytestmark = pytest.mark.slow

WINDOW, DEPTH = 64, 600
SLOTS = 640
TARGETS = ("cpu", "onnx")

BuildOnce = Callable[..., BuildResult]
Checkpoint = Callable[[str], Path]


@pytest.fixture
def oracle(oracle_of: Callable[[str], Any]) -> Any:
    return oracle_of("gemma2")


@pytest.fixture(params=TARGETS)
def session(request: pytest.FixtureRequest, build_once: BuildOnce, checkpoint_of: Checkpoint) -> Session:
    checkpoint, target = checkpoint_of("gemma2"), request.param
    built = build_once(checkpoint=checkpoint, target=target, logits="all", max_length=SLOTS)
    return load(built.path, threads=1)


@pytest.mark.parametrize(
    "sizes",
    [
        (DEPTH,),
        # Steps that end one before, at and one after the end of the window, and single tokens from there on.
        (WINDOW - 1, 1, 1, 1, 1, 128, 7, *(1,) * (DEPTH - WINDOW - 138)),
        (1, WINDOW, WINDOW, DEPTH - 2 * WINDOW - 1),
        (200, 400),
    ],
    ids=["one step", "around the window", "of the window's size", "two"],
)
def test_every_position_far_beyond_the_window(sizes: tuple[int, ...], session: Session, oracle: Any) -> None:
    tokens = random_tokens(DEPTH)
    assert (
        relative_error(oracle_logits(oracle, tokens), run_in_steps(session, tokens, sizes)) < RELATIVE_ERROR
    )


@pytest.mark.parametrize("length", [WINDOW - 1, WINDOW, WINDOW + 1, DEPTH - 24])
def test_the_greedy_answer_to_a_prompt(length: int, session: Session, oracle: Any) -> None:
    prompt = random_tokens(length, seed=length)
    answer = session.generate_tokens(prompt, max_new_tokens=24, stop_tokens=())
    assert len(answer) == 24
    assert_greedy(oracle, prompt, answer)
    # transformers' own cache keeps of a local layer no more than its window: the same tokens.
    assert oracle_greedy(oracle, prompt, 24) == answer


def test_rows_of_other_lengths_have_windows_of_their_own(session: Session, oracle: Any) -> None:
    # Decoding runs all rows in one step, each at its own position.
    prompts = [random_tokens(length, seed=length) for length in (30, WINDOW - 4, 3 * WINDOW)]
    answers = session.generate_tokens_batch(prompts, max_new_tokens=16, stop_tokens=())
    for prompt, answer in zip(prompts, answers, strict=True):
        assert len(answer.tokens) == 16
        assert_greedy(oracle, prompt, answer.tokens)


@pytest.mark.parametrize("target", TARGETS)
def test_what_a_post_norm_makes_small_again_may_leave_fp16(
    target: str, checkpoint_of: Checkpoint, tmp_path: Path, traced_once: None
) -> None:
    """Attention 2^16 times as large is the same model, as a norm comes after it; its product overflows."""
    folder = Path(shutil.copytree(checkpoint_of("gemma2"), tmp_path / "checkpoint"))
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.self_attn.v_proj.weight"] *= 2.0**6
    weights["model.layers.0.self_attn.o_proj.weight"] *= 2.0**10
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    request = BuildRequest(
        checkpoint=folder,
        output=tmp_path / "bundle",
        target=target,
        precision="fp16",
        max_length=SLOTS,
        # The caps make logits small beside what rounding leaves: 0.7 % of the largest is seen, 0.5 % allowed.
        allow_parity_failure=True,
    )
    built = build(request)
    kept = {"layers.0.self_attn.o_proj"} if target == "onnx" else set()
    assert set(built.manifest.fp32_tensors) == kept
    assert built.report is not None
    assert built.report.figures.max_relative_error < 0.01
    assert built.report.figures.mean_kl < 1e-5


def test_scores_that_leave_fp16_are_no_reason_to_keep_attention_in_fp32(
    checkpoint_of: Checkpoint, tmp_path: Path, traced_once: None
) -> None:
    """Under a cap what is infinite is the cap; and TensorRT has no attention in fp32."""
    folder = Path(shutil.copytree(checkpoint_of("gemma2"), tmp_path / "checkpoint"))
    weights = load_file(folder / "model.safetensors")
    for name in ("q_proj", "k_proj"):
        weights[f"model.layers.0.self_attn.{name}.weight"] *= 2.0**8
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    built = build(
        BuildRequest(
            checkpoint=folder,
            output=tmp_path / "bundle",
            target="onnx",
            precision="fp16",
            max_length=SLOTS,
            # The last digits of such scores say whether they are the cap or its opposite.
            allow_parity_failure=True,
        )
    )
    assert built.manifest.fp32_tensors == ()
    assert built.manifest.graph.passes["decompose_attention"] == 2
    assert built.report is not None
    assert np.isfinite(built.report.figures.max_relative_error)


@pytest.mark.parametrize("target", TARGETS)
def test_the_trained_model_reads_what_transformers_reads(target: str, build_once: BuildOnce) -> None:
    """All of its 512 positions, in steps that end around its window of 64 too."""
    session = load(build_once(size="tiny2", target=target, logits="all").path, threads=1)
    oracle = load_oracle(tiny_folder("tiny2"))
    tokens = session.tokenizer.encode(f"{PROSE}\n{DIALOGUE}\n{NUMBERS}\n{GERMAN}")[: session.max_length]
    assert len(tokens) == 512
    sizes = (WINDOW - 1, 1, 1, 1, 1, 128, 7, *(1,) * 60, 250)
    expected = oracle_logits(oracle, tokens)
    assert relative_error(expected, run_in_steps(session, tokens, sizes)) < RELATIVE_ERROR
    answer = session.generate_tokens(tokens[:100], max_new_tokens=60, stop_tokens=())
    assert oracle_greedy(oracle, tokens[:100], 60) == answer


def test_transformers_agrees_with_the_gate(build_once: BuildOnce, checkpoint_of: Checkpoint) -> None:
    built = build_once(checkpoint=checkpoint_of("gemma2"), max_length=SLOTS, parity="quick")
    report = measure_bundle(
        built.path, checkpoint=None, reference="transformers", text=None, level="quick", listener=ignore
    )
    assert report.verdict == "pass"
    assert "transformers" in report.reference
