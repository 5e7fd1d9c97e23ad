"""Bundles run by onnxruntime-genai as they are: nothing is converted, and no file is added."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from support.oracle import random_tokens

from gemma_export.exporter.pipeline import BuildResult
from gemma_export.runtime.session import load

og = pytest.importorskip("onnxruntime_genai")

pytestmark = pytest.mark.slow

BUNDLES = {
    "cpu-fp32": {"target": "cpu", "precision": "fp32"},
    # Two formats in one file, and still fp32 between the operators.
    "cpu-fp16": {"target": "cpu", "precision": "fp16"},
    # The canonical graph: standard operators only.
    "onnx-fp32": {"target": "onnx", "precision": "fp32"},
}
NEW_TOKENS = 64
TEXTS = [
    "MENENIUS:\nWhat is the matter",
    "It was on a dreary night",
    "  two  spaces,\n\n\tand tabs: naïve 😀",
]


def greedy(model: Any, prompt: Sequence[int], new_tokens: int) -> list[int]:
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=len(prompt) + new_tokens)
    generator = og.Generator(model, parameters)
    generator.append_tokens(list(prompt))
    while not generator.is_done():
        generator.generate_next_token()
    return [int(token) for token in generator.get_sequence(0)[len(prompt) :]]


@pytest.fixture(params=BUNDLES)
def bundle(request: pytest.FixtureRequest, build_once: Callable[..., BuildResult]) -> Path:
    return build_once(size="tiny", **BUNDLES[request.param]).path


def test_says_what_the_projects_runtime_says(bundle: Path) -> None:
    session, model = load(bundle, threads=1), og.Model(str(bundle))
    tokenizer = og.Tokenizer(model)
    tokenizer.update_options(add_special_tokens=True)
    generated = 0
    for text in TEXTS:
        prompt = session.tokenizer.encode(text)
        assert tokenizer.encode(text).tolist() == prompt
        expected = session.generate_tokens(prompt, max_new_tokens=NEW_TOKENS)
        assert greedy(model, prompt, NEW_TOKENS) == expected
        assert tokenizer.decode(expected) == str(session.generate(text, max_new_tokens=NEW_TOKENS))
        generated = max(generated, len(expected))
    assert generated >= 40


def test_a_prompt_of_one_token_and_a_cache_filled_to_its_end(bundle: Path) -> None:
    session, model = load(bundle, threads=1), og.Model(str(bundle))
    slots = session.max_length
    assert greedy(model, [2], 12) == session.generate_tokens([2], max_new_tokens=12)
    prompt = (session.tokenizer.encode(TEXTS[0]) * slots)[: slots - 8]
    # genai counts the tokens, this project the slots: it generates one more, which needs none.
    assert greedy(model, prompt, 8) == session.generate_tokens(prompt, stop_tokens=())[:8]


@pytest.mark.parametrize("target", ["cpu", "onnx"])
def test_the_second_generation_says_the_same_around_and_beyond_its_window(
    target: str, build_once: Callable[..., BuildResult], checkpoint_of: Callable[[str], Path]
) -> None:
    bundle = build_once(checkpoint=checkpoint_of("gemma2"), target=target, max_length=640).path
    session, model = load(bundle, threads=1), og.Model(str(bundle))
    assert model.type == "gemma2"
    for length in (63, 64, 65, 600):
        prompt = random_tokens(length, seed=length)
        expected = session.generate_tokens(prompt, max_new_tokens=24, stop_tokens=())
        # It ends where a stop token comes, which these weights have no reason to give.
        assert greedy(model, prompt, 24) == expected


def test_local_caches_roll_as_in_the_projects_runtime(
    build_once: Callable[..., BuildResult], checkpoint_of: Callable[[str], Path]
) -> None:
    bundle = build_once(
        checkpoint=checkpoint_of("gemma2"), target="onnx", max_length=640, logits="all", local_cache="rolling"
    ).path
    session, model = load(bundle, threads=1), og.Model(str(bundle))
    for length in (500, 129, 63):
        prompt = random_tokens(length, seed=length)
        # Its caches have the length of its configuration, whatever a search may be given.
        generator = og.Generator(model, og.GeneratorParams(model))
        generator.append_tokens(prompt)
        for _ in range(100):
            generator.generate_next_token()
        answer = [int(token) for token in generator.get_sequence(0)[length:]]
        assert answer == session.generate_tokens(prompt, max_new_tokens=100, stop_tokens=())
    # Later tokens it runs at once: more than the caches take are refused, and are not answered wrongly.
    with pytest.raises(RuntimeError, match="exceeds max_sequence_length"):
        generator.append_tokens(random_tokens(66))
