"""A turn of onnxruntime-genai on the same bundle: the same tokens, the same lengths, the same threads."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import onnxruntime_genai as og

from gemma_export.errors import GemmaExportError, first_line
from gemma_export.exporter.bench.plan import real_tokens
from gemma_export.exporter.bench.values import Plan, Timing, Turn
from gemma_export.runtime.bundle import TOKENIZER_NAME, open_bundle
from gemma_export.runtime.tokenizer import Tokenizer

Clock = Callable[[], float]


def run_turn(path: Path, plan: Plan, clock: Clock = perf_counter) -> Turn:
    """Loads a bundle into onnxruntime-genai and runs the plan once.

    Args:
        path: The bundle.
        plan: What is run.
        clock: Seconds.

    Raises:
        GemmaExportError: onnxruntime-genai does not load or run the bundle.
    """
    bundle = open_bundle(path, check="sizes")
    tokenizer = Tokenizer(bundle.file(TOKENIZER_NAME), bundle.manifest.model.vocab_size)
    tokens = real_tokens(tokenizer, plan.slots + 1)
    try:
        return _run(bundle.path, bundle.manifest.graph.max_length, plan, tokens, clock)
    except Exception as error:
        # Its exceptions share no base of their own.
        raise GemmaExportError(
            f"onnxruntime-genai {og.__version__} cannot run {path}: {first_line(error).rstrip('.')}.",
            "Leave out --compare genai to measure the bundle alone.",
        ) from error


def _run(path: Path, max_length: int, plan: Plan, tokens: Sequence[int], clock: Clock) -> Turn:
    begin = clock()
    config = og.Config(str(path))
    threads = {"intra_op_num_threads": plan.threads}
    config.overlay(json.dumps({"model": {"decoder": {"session_options": threads}}}))
    model = og.Model(config)
    load = clock() - begin
    # Like ours, the first token comes right after loading, and what is measured next is warm.
    begin = clock()
    _started(model, tokens[: plan.first_prompt], max_length).generate_next_token()
    first_token = Timing(0, plan.first_prompt, clock() - begin)
    prefill, decode = [], []
    for length in plan.lengths:
        begin = clock()
        generator = _started(model, tokens[: max(length, 1)], max_length)
        if length in plan.prompts:
            prefill.append(Timing(length, length, clock() - begin))
        if length in plan.depths:
            # The logits are there: the first call only chooses among them.
            generator.generate_next_token()
            decode.append(_decode(generator, length, plan.tokens, clock))
        del generator
    return Turn(load, first_token, tuple(prefill), tuple(decode), choosing=None, peak=0)


def _started(model: Any, tokens: Sequence[int], max_length: int) -> Any:
    """A generator that has read a prompt."""
    parameters = og.GeneratorParams(model)
    # A text that its model ends would leave less to measure: before the last slot it may not.
    parameters.set_search_options(max_length=max_length, min_length=max_length, do_sample=False)
    generator = og.Generator(model, parameters)
    generator.append_tokens(list(tokens))
    return generator


def _decode(generator: Any, depth: int, count: int, clock: Clock) -> Timing:
    """Decodes so many tokens, or to the last slot: the token that was chosen before takes one."""
    done = 0
    begin = clock()
    while done < count and not generator.is_done():
        generator.generate_next_token()
        done += 1
    return Timing(depth, done, clock() - begin)
