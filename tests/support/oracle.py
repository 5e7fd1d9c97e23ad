"""Little Gemmas that Hugging Face's `transformers` writes, and runs as the independent oracle.

It shares no line with the exporter. Everything is in fp32 with eager attention, whatever the checkpoint's
format.
"""

import copy
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from support.small_bundle import TOKENIZER

from gemma_export.runtime.session import Session

Logits = npt.NDArray[np.float32]

SLOTS = 320
"""Cache slots of the bundles: a prompt and 200 tokens more."""
RELATIVE_ERROR = 2e-5
"""Of the largest logit, between two fp32 programs that sum in another order. A sum of n terms is off by about
sqrt(n) · 2^-24, 7e-7 at the n <= 128 of these models; their layers add far more than the embedding and so
carry it on enlarged: 1e-6 to 5e-6 is measured, and 1e-6 of the trained model. Four times that leaves room for
other processors. The mildest defect that a test plants (exact instead of tanh GELU) is 3e-4."""


@dataclass(frozen=True)
class Family:
    """A shape of Gemma, and the number format its checkpoint is stored in."""

    query_heads: int
    kv_heads: int
    hidden: int
    head_dim: int
    dtype: torch.dtype
    seed: int
    window: int | None = None  # Of the second generation's local layers.


FAMILIES = {
    # As the 2B: one KV head, H · h = d.
    "mqa": Family(query_heads=4, kv_heads=1, hidden=64, head_dim=16, dtype=torch.float32, seed=1),
    # As the 7B: as many KV heads as query heads, and H · h > d; h is not d / H.
    "mha": Family(query_heads=4, kv_heads=4, hidden=48, head_dim=32, dtype=torch.bfloat16, seed=1),
    # Between the two, H · h < d, and a d whose root is not a whole number.
    "gqa": Family(query_heads=4, kv_heads=2, hidden=72, head_dim=16, dtype=torch.float16, seed=1),
    # The second generation: as "gqa", with a window far smaller than the cache.
    "gemma2": Family(
        query_heads=4, kv_heads=2, hidden=72, head_dim=16, dtype=torch.bfloat16, seed=1, window=64
    ),
}
LAYERS, FEED_FORWARD, VOCABULARY = 2, 96, 2048
SECOND: dict[str, Any] = {
    "attn_logit_softcapping": 5.0,
    "final_logit_softcapping": 3.0,
    "query_pre_attn_scalar": 24,
}
"""What the second generation has beside its window: such caps bend scores of standard deviation 3 and logits
of 1.3, and the scale is not that of the heads' width."""


def random_gemma(family: Family, **config: Any) -> Any:
    """A `GemmaForCausalLM`, or its successor, with random weights that are exact in the family's format.

    The layers add far more to the residual stream than the embedding, so that greedy text wanders instead of
    repeating the last token (the head is tied), and the tokens are far enough apart for ties to be rare.
    """
    import transformers

    shape: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": family.hidden,
        "intermediate_size": FEED_FORWARD,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": family.query_heads,
        "num_key_value_heads": family.kv_heads,
        "head_dim": family.head_dim,
        "max_position_embeddings": 1024,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
    }
    if family.window is None:
        model = transformers.GemmaForCausalLM(transformers.GemmaConfig(**shape, **config))
    else:
        second = {**shape, **SECOND, "sliding_window": family.window, **config}
        model = transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**second))
    model = model.float().eval()
    generator = torch.Generator().manual_seed(family.seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.randn(parameter.shape, generator=generator) * _scale(name, parameter)
            if name.endswith(POST_NORMS) and family.window is not None:
                values += 5.0  # A layer's output is as long as its gain, whatever the layer's weights are.
            parameter.copy_(values.to(family.dtype))
    return model


POST_NORMS = ("post_attention_layernorm.weight", "post_feedforward_layernorm.weight")


def _scale(name: str, parameter: torch.Tensor) -> float:
    if parameter.ndim == 1:
        return 0.2
    if "embed_tokens" in name:
        return 0.15
    gain = 15.0 if name.endswith(("o_proj.weight", "down_proj.weight")) else 2.0
    return float(gain * parameter.shape[1] ** -0.5)


def save_checkpoint(model: Any, folder: Path, dtype: torch.dtype, **options: Any) -> Path:
    """Saves as Hugging Face does, in `dtype`, with the shipped tokenizer beside the weights."""
    copy.deepcopy(model).to(dtype).save_pretrained(folder, **options)
    shutil.copyfile(TOKENIZER, folder / "tokenizer.model")
    return folder


def load_oracle(folder: Path) -> Any:
    """The model of a folder as `transformers` reads it, in fp32."""
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", local_files_only=True
    ).eval()


@torch.inference_mode()
def oracle_logits(model: Any, tokens: Sequence[int]) -> Logits:
    """Logits after every token [T, V], in one pass without a cache."""
    logits: Logits = model(torch.tensor([list(tokens)]), use_cache=False).logits[0].float().numpy()
    return logits


@torch.inference_mode()
def oracle_greedy(model: Any, prompt: Sequence[int], count: int) -> list[int]:
    """`count` greedy tokens by `transformers`' own generation over its own cache; no token stops it."""
    model.generation_config.eos_token_id = None
    ids = torch.tensor([list(prompt)])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=count, pad_token_id=0
    )
    return [int(token) for token in out[0, len(prompt) :]]


def assert_greedy(model: Any, prompt: Sequence[int], tokens: Sequence[int]) -> None:
    """Asserts that `tokens` are the oracle's own greedy continuation of `prompt`, and not by a near tie.

    One pass over both: as long as its arg-max at each position is the next token, so is its continuation. The
    margin of each choice must be larger than the two logits can be off, or the test could pass or fail by it.
    """
    logits = oracle_logits(model, [*prompt, *tokens[:-1]])
    rows = logits[len(prompt) - 1 :]
    assert rows.argmax(axis=1).tolist() == list(tokens)
    best = np.sort(rows, axis=1)[:, -2:]
    margin = (best[:, 1] - best[:, 0]).min() / np.abs(logits).max()
    assert margin > 2 * RELATIVE_ERROR, f"a near tie, {margin:.1e}: choose another prompt"


def relative_error(reference: Logits, logits: Logits) -> float:
    """Largest difference, of the largest logit."""
    assert reference.shape == logits.shape
    return float(np.abs(reference - logits).max() / np.abs(reference).max())


def random_tokens(count: int, seed: int = 0) -> list[int]:
    """Ids of pieces that are no control tokens; the first is <bos>."""
    rng = np.random.default_rng(seed)
    return [2, *rng.integers(300, VOCABULARY, count - 1).tolist()]


def run_in_steps(session: Session, tokens: Sequence[int], sizes: Iterable[int]) -> Logits:
    """Logits [T, V] of tokens that are run in steps, of a bundle that gives those of all."""
    cache, found, start = session.new_cache(), [], 0
    for size in sizes:
        found.append(session.step([tokens[start : start + size]], cache)[0])
        start += size
    assert start == len(tokens)
    return np.concatenate(found)
