"""A turn of Hugging Face's transformers in bfloat16 on a checkpoint: the same tokens, lengths and threads."""

from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import transformers

from gemma_export.errors import GemmaExportError, first_line
from gemma_export.exporter.bench.plan import real_tokens
from gemma_export.exporter.bench.values import Plan, Timing, Turn
from gemma_export.runtime.bundle import TOKENIZER_NAME, open_bundle
from gemma_export.runtime.tokenizer import Tokenizer

Clock = Callable[[], float]

_LIBRARY: Any = transformers  # Some of its functions have no types.


def run_turn(path: Path, checkpoint: Path, plan: Plan, clock: Clock = perf_counter) -> Turn:
    """Loads a checkpoint into transformers and runs the plan once.

    A prompt is run in one step, as `generate` does there.

    Args:
        path: The bundle it is compared with, whose tokens are run.
        checkpoint: A folder with `config.json` and safetensors.
        plan: What is run.
        clock: Seconds.

    Raises:
        GemmaExportError: transformers does not load or run the checkpoint.
    """
    bundle = open_bundle(path, check="sizes")
    tokenizer = Tokenizer(bundle.file(TOKENIZER_NAME), bundle.manifest.model.vocab_size)
    tokens = real_tokens(tokenizer, plan.slots + 1)
    torch.set_num_threads(plan.threads)
    _LIBRARY.utils.logging.set_verbosity_error()
    _LIBRARY.utils.logging.disable_progress_bar()
    try:
        with torch.inference_mode():
            return _run(checkpoint, plan, tokens, clock)
    except Exception as error:
        # What it raises comes from many libraries.
        raise GemmaExportError(
            f"transformers {_LIBRARY.__version__} cannot run {checkpoint}: {first_line(error).rstrip('.')}.",
            "Give the folder of the bundle's own checkpoint: --compare CHECKPOINT.",
        ) from error


def _run(checkpoint: Path, plan: Plan, tokens: Sequence[int], clock: Clock) -> Turn:
    begin = clock()
    model = _LIBRARY.AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=torch.bfloat16, local_files_only=True
    ).eval()
    load = clock() - begin
    # Like ours, the first token comes right after loading, and what is measured next is warm.
    begin = clock()
    _step(model, tokens[: plan.first_prompt], None)
    first_token = Timing(0, plan.first_prompt, clock() - begin)
    prefill, decode = [], []
    for length in plan.lengths:
        begin = clock()
        token, cache = _step(model, tokens[: max(length, 1)], None)
        if length in plan.prompts:
            prefill.append(Timing(length, length, clock() - begin))
        if length in plan.depths:
            begin = clock()
            for _ in range(plan.tokens):
                token, cache = _step(model, [token], cache)
            decode.append(Timing(length, plan.tokens, clock() - begin))
        del cache
    return Turn(load, first_token, tuple(prefill), tuple(decode), choosing=None, peak=0)


def _step(model: Any, tokens: Sequence[int], cache: Any) -> tuple[int, Any]:
    """Runs tokens behind a cache; the likeliest next one, and the cache that holds them, too."""
    ids = torch.tensor([list(tokens)])
    output = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return int(output.logits[0, -1].argmax()), output.past_key_values
