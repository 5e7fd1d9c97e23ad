"""Training: Transformers' Gemma decoders in mixed precision, regularised because the texts are short."""

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import sentencepiece as spm
import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from recipes.tiny.corpus import Text, epoch
from recipes.tiny.tokenizer import BOS, EOS, PAD, VOCABULARY

ROPE_THETA = 10000.0
IGNORED = -100  # The target index that cross_entropy skips.


@dataclass(frozen=True)
class Settings:
    """How to train.

    Attributes:
        size: What to train, a key of ``SHAPES``.
        steps: Optimiser steps.
        seed: Seeds the weights, the rows and the dropout, but not the BPE-dropout, which takes no seed.
        rows: Rows in a batch.
        length: Ids in a row, <bos> included.
        peak_rate: Learning rate after the warm-up.
        warmup: Steps of linear warm-up.
        final_share: Share of the peak rate that the cosine ends at.
        weight_decay: AdamW's decay of the matrices; the norms have none.
        clip: Largest gradient norm.
        dropout: On the embeddings and on what each block adds to the residual stream.
        merge_dropout: BPE-dropout of the first epoch; it falls linearly to zero.
        average: Decay of the weight average per step.
    """

    size: str
    steps: int
    seed: int
    rows: int = 8
    length: int = 512
    peak_rate: float = 2e-3
    warmup: int = 100
    final_share: float = 0.02
    weight_decay: float = 0.1
    clip: float = 1.0
    dropout: float = 0.1
    merge_dropout: float = 0.1
    average: float = 0.99


SHAPES: Mapping[str, Mapping[str, Any]] = {
    # Gemma 1 at 6.1 million parameters: one key/value head, heads wider than hidden / heads.
    "tiny": {
        "model_type": "gemma",
        "num_hidden_layers": 5,
        "num_key_value_heads": 1,
        "hidden_act": "gelu_pytorch_tanh",
    },
    # Gemma 2 at 5.2 million: a window far below the 512 positions, soft-caps that bend what a trained model
    # makes, and, as in the 27B, a scale of hidden / heads that is not the heads' width.
    "tiny2": {
        "model_type": "gemma2",
        "num_hidden_layers": 4,
        "num_key_value_heads": 2,
        "hidden_activation": "gelu_pytorch_tanh",
        "sliding_window": 64,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 10.0,
        "query_pre_attn_scalar": 64,
    },
}
"""What the models differ in, as their configurations say it."""


def config(size: str, length: int) -> PreTrainedConfig:
    """A model's configuration.

    Args:
        size: A key of ``SHAPES``.
        length: Longest row, in ids.
    """
    return AutoConfig.for_model(
        **SHAPES[size],
        vocab_size=VOCABULARY,
        hidden_size=256,
        num_attention_heads=4,
        head_dim=128,
        intermediate_size=1024,
        max_position_embeddings=length,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        tie_word_embeddings=True,
        pad_token_id=PAD,
        eos_token_id=EOS,
        bos_token_id=BOS,
        use_cache=False,
    )


def train(
    pieces: spm.SentencePieceProcessor,
    texts: list[Text],
    settings: Settings,
    report: Callable[[int, float, PreTrainedModel], None],
) -> tuple[PreTrainedModel, int]:
    """Trains a model from random weights.

    Args:
        pieces: The tokenizer.
        texts: Both texts; only their training parts are read.
        settings: How to train.
        report: Called after every step with the steps done, the step's loss in nats per token and the
            averaged model.

    Returns:
        The averaged model, float32, in evaluation mode; and the number of target tokens trained on.
    """
    torch.manual_seed(settings.seed)
    shape = config(settings.size, settings.length)
    model = AutoModelForCausalLM.from_config(shape).train()
    model.set_attn_implementation("grouped")
    drop_out(model, settings.dropout)
    averaged = AutoModelForCausalLM.from_config(shape)
    averaged.eval()
    averaged.load_state_dict(model.state_dict())
    matrices = [weight for weight in model.parameters() if weight.dim() > 1]
    vectors = [weight for weight in model.parameters() if weight.dim() == 1]
    optimiser = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": settings.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=settings.peak_rate,
        betas=(0.9, 0.98),
        fused=True,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: rate(step, settings))
    seen = 0
    for step, (ids, targets) in enumerate(batches(pieces, texts, settings), start=1):
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=ids).logits
        loss = nn.functional.cross_entropy(
            logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED
        )
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
        decay = min(settings.average, step / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(averaged.parameters()), list(model.parameters()), 1 - decay)
        seen += int((targets != IGNORED).sum())
        report(step, loss.item(), averaged)
    return averaged, seen


def grouped_attention(
    _module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    _mask: Tensor | None,
    scaling: float,
    softcap: float | None = None,
    sliding_window: int | None = None,
    **_options: object,
) -> tuple[Tensor, None]:
    """Causal attention as two batched products over the key/value heads.

    It gives what Transformers' own attention gives, in half the time on a processor with bfloat16 arithmetic.

    Args:
        _module: The attention layer; not used.
        query: (rows, query heads, length, head size).
        key: (rows, key/value heads, length, head size).
        value: (rows, key/value heads, length, head size).
        _mask: Not used: rows are padded on the right, where a causal model does not look.
        scaling: Multiplies the scores.
        softcap: Bends the scores before they are masked, where there is one.
        sliding_window: How many positions are seen, the own among them; all before it where there is none.
        **_options: What other attention functions take.

    Returns:
        (rows, length, query heads, head size), and None in place of the attention weights.
    """
    rows, heads, length, size = query.shape
    batch, shared = rows * key.shape[1], heads // key.shape[1]
    unseen = masked(shared, length, sliding_window, query.dtype).expand(batch, -1, -1)
    folded = query.reshape(batch, shared * length, size)
    turned = key.reshape(batch, length, size).transpose(1, 2)
    if softcap is None:
        scores = torch.baddbmm(unseen, folded, turned, alpha=scaling)
    else:
        scores = torch.bmm(folded, turned).mul(scaling / softcap).tanh().mul(softcap) + unseen
    mixed = torch.bmm(scores.softmax(-1), value.reshape(batch, length, size))
    return mixed.view(rows, heads, length, size).transpose(1, 2).contiguous(), None


@lru_cache(maxsize=4)  # Nearly all batches are of one length.
def masked(heads: int, length: int, window: int | None, dtype: torch.dtype) -> Tensor:
    """What to add to the scores of every head, so that no position looks ahead or beyond its window.

    Returns:
        (heads * length, length).
    """
    nothing = torch.full((length, length), float("-inf"), dtype=dtype)
    unseen = nothing.triu(1)
    if window is not None:
        unseen = unseen + nothing.tril(-window)
    return unseen.repeat(heads, 1)


AttentionInterface.register("grouped", grouped_attention)


def rate(step: int, settings: Settings) -> float:
    """Share of the peak learning rate at a step: linear warm-up, then a cosine down to ``final_share``."""
    if step < settings.warmup:
        return (step + 1) / settings.warmup
    progress = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    cosine = 0.5 * (1 + torch.cos(torch.tensor(torch.pi * min(progress, 1.0)))).item()
    return settings.final_share + (1 - settings.final_share) * cosine


def drop_out(model: PreTrainedModel, share: float) -> None:
    """Adds dropout, which Gemma's modules lack, to the embeddings and to what layers add to the stream.

    Args:
        model: Changed in place; the hooks do nothing in evaluation mode and leave no trace in the weights.
        share: Probability of zeroing each value.
    """

    def hook(module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return nn.functional.dropout(output, share, module.training)

    model.model.embed_tokens.register_forward_hook(hook)
    for layer in model.model.layers:
        added = (layer.self_attn.o_proj, layer.mlp.down_proj)
        if model.config.model_type == "gemma2":
            added = (layer.post_attention_layernorm, layer.post_feedforward_layernorm)
        for module in added:
            module.register_forward_hook(hook)


def batches(
    pieces: spm.SentencePieceProcessor, texts: list[Text], settings: Settings
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of inputs and next-token targets, one epoch after another until the steps are used up.

    Yields:
        Two int64 tensors of shape (rows, longest row in the batch - 1): ids padded with <pad>, and targets
        padded with ``IGNORED``.
    """
    rng = random.Random(settings.seed)
    done = 0
    while done < settings.steps:
        merge_dropout = settings.merge_dropout * (1 - done / settings.steps)
        rows = epoch(pieces, texts, settings.length, merge_dropout, rng)
        for at in range(0, len(rows) - settings.rows + 1, settings.rows):
            if done == settings.steps:
                return
            yield collate(rows[at : at + settings.rows])
            done += 1


def collate(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Pads rows on the right, which a causal model needs no mask for, into the tensors of ``batches``."""
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest - 1), PAD)
    targets = torch.full((len(rows), longest - 1), IGNORED)
    for at, row in enumerate(rows):
        ids[at, : len(row) - 1] = torch.tensor(row[:-1])
        targets[at, : len(row) - 1] = torch.tensor(row[1:])
    return ids, targets
