"""What TensorRT compiles, run on a CPU for 200 cached steps, says what the reference says.

The graph is the lowered one, of the target `onnx`: the targets `rtx` and `tensorrt` compile the same
(`tests/graphs/test_spec_tensorrt.py`). In fp32 it is run as it is; in 16 bits and in codes through its twin,
which rounds where a device does, with QuantizeLinear and DequantizeLinear computed as written.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from support.oracle import RELATIVE_ERROR, SLOTS, assert_greedy, random_tokens

from gemma_export.exporter.parity.reference import Reference
from gemma_export.exporter.parity.twin import measurable_session
from gemma_export.exporter.pipeline import BuildResult
from gemma_export.exporter.source import open_source
from gemma_export.runtime.parity import BUDGETS
from gemma_export.runtime.session import Session, load

BuildOnce = Callable[..., BuildResult]
Logits = npt.NDArray[np.float32]

STEPS = 200
PROMPT = "Chapter 1\n\nYou will rejoice to hear"


@pytest.mark.slow
@pytest.mark.parametrize(("family", "seed"), [("mqa", 2), ("mha", 2), ("gqa", 2), ("gemma2", 6)])
def test_200_greedy_tokens_of_the_lowered_graph_are_those_of_transformers(
    family: str,
    seed: int,
    build_once: BuildOnce,
    checkpoint_of: Callable[[str], Path],
    oracle_of: Callable[[str], Any],
) -> None:
    result = build_once(checkpoint=checkpoint_of(family), target="onnx", max_length=SLOTS)
    assert result.manifest.graph.passes["flatten_tokens"] > 0  # It is TensorRT's graph.
    prompt = random_tokens(24, seed=seed)  # No step is a near tie.
    tokens = greedy(load(result.path, threads=1), prompt)
    assert_greedy(oracle_of(family), prompt, tokens)


WAYS = [("fp32", None), ("fp16", None), ("bf16", None)]
WAYS += [("int8", "w8a16"), ("int8", "w8a8"), ("int4", "w4a16")]


@pytest.mark.slow
@pytest.mark.parametrize("size", ["tiny", "tiny2"])
@pytest.mark.parametrize(("precision", "scheme"), WAYS, ids=["-".join(filter(None, way)) for way in WAYS])
def test_the_shipped_model_goes_on_for_200_cached_steps(
    precision: str, scheme: str | None, size: str, build_once: BuildOnce
) -> None:
    # As the tests of precisions and of schemes build it, so that it is built once.
    options = {"scheme_name": scheme, "logits": "all"} if scheme else {}
    result = build_once(size=size, target="onnx", precision=precision, parity="quick", **options)
    session = measurable_session(result.path)
    prompt = session.tokenizer.encode(PROMPT)
    tokens, rows = cached_rows(session, prompt)
    source = open_source(size=size)
    run = Reference(source.config, source.weights).run([[*prompt, *tokens[:-1]]], keep_cache=False)
    reference = run.logits(0, len(prompt) - 1)
    agreement = float((reference.argmax(axis=1) == tokens).mean())
    error = float(np.abs(rows - reference).max() / np.abs(reference).max())
    if precision == "fp32":
        assert agreement == 1
        assert error < RELATIVE_ERROR
    else:
        # After the same text nearly every token is the reference's first choice; a near tie is decided by a
        # rounding. A step must not add to the error of the step before, so what the gate allows of a prompt
        # holds for the 200th step too.
        assert agreement >= BUDGETS[precision].top1_agreement
        assert error <= BUDGETS[precision].max_relative_error
    # The text goes on: a token that is repeated 200 times would be right by chance.
    assert len(set(tokens)) > 20


def greedy(session: Session, prompt: list[int]) -> list[int]:
    return cached_rows(session, prompt)[0]


def cached_rows(session: Session, prompt: list[int]) -> tuple[list[int], Logits]:
    """200 greedy tokens, one cached step each, and the logits [200, V] that each was the largest of."""
    cache = session.new_cache()
    logits = session.step([prompt], cache)
    tokens: list[int] = []
    rows = []
    while True:
        rows.append(logits[0, -1])
        tokens.append(int(rows[-1].argmax()))
        if len(tokens) == STEPS:
            return tokens, np.stack(rows)
        logits = session.step([[tokens[-1]]], cache)
