"""Measures of a model on text it has not seen, and of the unigram model it has to beat."""

import math
from collections import Counter
from dataclasses import dataclass

import sentencepiece as spm
import torch
from torch import nn
from transformers import PreTrainedModel

from recipes.tiny.corpus import Text, windows
from recipes.tiny.train import IGNORED, collate


@dataclass(frozen=True)
class Measures:
    """What a model makes of held-out text.

    Attributes:
        tokens: Tokens predicted.
        bytes: UTF-8 bytes that they stand for.
        perplexity: Of the model, per token.
        bits_per_byte: Of the model.
        unigram_perplexity: Of the training tokens' frequencies, on the same tokens.
    """

    tokens: int
    bytes: int
    perplexity: float
    bits_per_byte: float
    unigram_perplexity: float


def measure(
    model: PreTrainedModel, pieces: spm.SentencePieceProcessor, texts: list[Text], length: int
) -> Measures:
    """Measures a model on the held-out ends, in rows that do not overlap and each begin with <bos>.

    Args:
        model: Any causal language model on this vocabulary, in evaluation mode.
        pieces: The tokenizer.
        texts: The texts to measure on.
        length: Ids in a row.
    """
    streams = [pieces.encode(text.held_out) for text in texts]
    rows = [row for stream in streams for row in windows(stream, length)]
    total = sum(map(nats, [model] * len(rows), rows))
    tokens = sum(map(len, rows)) - len(rows)
    size = sum(len(text.held_out.encode()) for text in texts)
    counts = Counter(token for text in texts for token in pieces.encode(text.train))
    smoothed = counts.total() + pieces.get_piece_size()  # One is added to every count, so that none is zero.
    unigram = sum(math.log(smoothed / (counts[token] + 1)) for row in rows for token in row[1:])
    return Measures(
        tokens=tokens,
        bytes=size,
        perplexity=math.exp(total / tokens),
        bits_per_byte=total / math.log(2) / size,
        unigram_perplexity=math.exp(unigram / tokens),
    )


@torch.inference_mode()
def nats(model: PreTrainedModel, row: list[int]) -> float:
    """Total negative log-likelihood of a row's ids after its first."""
    ids, targets = collate([row])
    logits = model(input_ids=ids).logits.float()
    loss = nn.functional.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum"
    )
    return loss.item()
