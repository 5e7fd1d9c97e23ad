"""Text that the model writes itself: what it is calibrated on where no file is given.

What a model finds likely is what it was trained on, so its own samples are close to the text it will meet,
where random tokens are not. All samples are written together: a token of each costs one pass over the layers,
which are read one after the other as the reference reads them.

Symbols in the shape comments: B samples, d hidden size, K KV heads, S slots, h head_dim, V vocabulary.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

import numpy as np
import torch
from torch import Tensor

from gemma_export.calibration.text import builtin_texts
from gemma_export.errors import CheckpointError
from gemma_export.exporter.checkpoints.checkpoint import LazyTensor
from gemma_export.exporter.config import GemmaConfig
from gemma_export.exporter.decoder import DecoderLayer, RMSNorm, layer_masks, rotary_tables
from gemma_export.exporter.parity.reference import Array, Reference, empty_module, head_logits
from gemma_export.exporter.tokenizer.sentencepiece_model import PieceKind, parse_model
from gemma_export.graphs.tensors import InMemory
from gemma_export.runtime.sampling import SamplingOptions, distribution, draw, greedy
from gemma_export.runtime.tokenizer import Tokenizer

KEPT_BYTES = 1 << 30
"""A model that takes no more than this in fp32 is read once and kept; of a larger one, a layer at a time."""
BEGINNING_TOKENS = 8
"""Taken from a passage for a sample to begin with, the beginning-of-sequence token aside."""
SHORTEST = 8
"""Tokens of a sample: the model may end it from there on, and what is shorter is left out."""

_TABLE = "embed_tokens.weight"

# Pieces of Gemma's tokenizer that SentencePiece takes for text, and that no text has.
_RESERVED = re.compile(r"<unused\d+>|<mask>|<2mass>|\[@BOS@\]|\[multimodal\]|<start_of_turn>|<end_of_turn>")


def barred_tokens(tokenizer_model: bytes, vocab_size: int, eos: int) -> list[int]:
    """Ids that no text has: of control tokens but the end of a text, of unused pieces, and of no piece.

    Args:
        tokenizer_model: The contents of a `tokenizer.model`.
        vocab_size: Rows of the embedding table, which may be more than there are pieces.
        eos: The end of a text, which ends a sample.
    """
    model = parse_model(tokenizer_model)
    special = set(model.ids(PieceKind.CONTROL, PieceKind.UNKNOWN, PieceKind.UNUSED)) - {eos}
    reserved = {i for i in model.ids(PieceKind.USER_DEFINED) if _RESERVED.fullmatch(model.pieces[i].text)}
    return sorted(special | reserved | set(range(len(model.pieces), vocab_size)))


def beginnings(tokenizer: Tokenizer, samples: int, length: int) -> list[list[int]]:
    """What samples begin with: BOS alone, and in turns with it BOS and the first words of a passage."""
    passages = [tokenizer.encode_plain(passage.text) for passage in builtin_texts()]
    words = min(BEGINNING_TOKENS, length // 2)
    return [
        [tokenizer.bos, *(passages[i // 2 % len(passages)][:words] if i % 2 else ())] for i in range(samples)
    ]


def write_samples(
    config: GemmaConfig,
    weights: Mapping[str, LazyTensor],
    beginnings: Sequence[Sequence[int]],
    *,
    length: int,
    seed: int,
    barred: Sequence[int] = (),
    temperature: float = 1.0,
    progress: Callable[[int, int], None] | None = None,
) -> list[list[int]]:
    """Samples in the model's own words; the same for the same seed.

    Where the model ends a sample, it begins another in its place, so that none is empty and no pass is lost.
    A sample's draws depend on its place among the samples and on the seed, not on the others.

    Args:
        config: The model's shape.
        weights: Canonical name → lazy tensor.
        beginnings: The tokens that each sample begins with, at least one and fewer than `length`.
        length: The most tokens of a sample.
        seed: Of the draws.
        barred: Tokens that are never drawn.
        temperature: 1 draws with the model's probabilities, 0 takes the likeliest token.
        progress: Called with the tokens written so far and those there will be.

    Raises:
        CheckpointError: The model's logits are no numbers.
    """
    shortest = min(SHORTEST, length)
    options = SamplingOptions(temperature=temperature)
    rows = [_Row(list(beginning), np.random.default_rng([seed, i])) for i, beginning in enumerate(beginnings)]
    model = _Decoder(config, weights, len(rows), length)
    for step in range(1, length):
        logits = model.step([row.tokens[row.position] for row in rows], [row.position for row in rows])
        logits[:, list(barred)] = -np.inf
        for row, scores in zip(rows, logits, strict=True):
            row.position += 1
            if row.position < len(row.tokens):
                continue  # It is still at its beginning, which is given.
            if len(row.tokens) < shortest:
                scores[config.eos_token_id] = -np.inf
            token = _choose(scores, options, row.random)
            if token == config.eos_token_id:
                row.begin_again(config.bos_token_id)
            else:
                row.tokens.append(token)
        if progress is not None:
            progress(step * len(rows), (length - 1) * len(rows))
    written = [sample for row in rows for sample in (*row.ended, row.tokens)]
    return [sample for sample in written if len(sample) >= shortest]


@dataclass
class _Row:
    """A sample that is being written, and those that ended in its place before."""

    tokens: list[int]
    random: np.random.Generator
    position: int = 0
    ended: list[list[int]] = field(default_factory=list)

    def begin_again(self, bos: int) -> None:
        """Ends the sample. Slots of the next are visible only once it has written them itself."""
        self.ended.append(self.tokens)
        self.tokens, self.position = [bos], 0


def _choose(scores: Array, options: SamplingOptions, random: np.random.Generator) -> int:
    largest = scores.max()  # NaN, where there is one.
    if not np.isfinite(largest):
        raise CheckpointError(
            f"The model cannot write: its largest logit is {largest}.",
            "Some of its weights are no numbers; download the checkpoint again.",
        )
    if options.temperature == 0:
        return greedy(scores)
    ids, probabilities = distribution(scores, options)
    return int(ids[draw(probabilities, random.random())])


class _Decoder:
    """The decoder in fp32 with a cache, which takes a token of every row at a time.

    Memory: a layer, or the whole model where that is small, and the cache: of each token 37 kB (2B) or
    0.9 MB (7B).
    """

    def __init__(self, config: GemmaConfig, weights: Mapping[str, LazyTensor], rows: int, slots: int) -> None:
        self._config = config
        self._slots = slots
        self._tables = rotary_tables(config, slots)
        shape = (rows, config.num_kv_heads, slots, config.head_dim)
        self._caches = [(torch.zeros(shape), torch.zeros(shape)) for _ in range(config.num_layers)]
        small = 4 * sum(prod(shape) for shape in config.weight_shapes.values()) <= KEPT_BYTES
        self._head = weights[_TABLE]
        if small:
            self._head = InMemory(_TABLE, self._head.read(0, config.vocab_size).float())
        self._reference = Reference(config, {**weights, _TABLE: self._head})
        self._norm: RMSNorm = empty_module(lambda: RMSNorm(config.hidden_size, config.rms_norm_eps))
        self._load(self._norm, "norm")
        self._kept = list(self._read_layers(self._empty_layer)) if small else None

    @torch.inference_mode()
    def step(self, tokens: Sequence[int], positions: Sequence[int]) -> Array:
        """Logits [B, V] after a token of each row, at its position; the caller's own."""
        x = torch.stack(self._reference.embed([[token] for token in tokens]))  # [B, 1, d]
        position_ids = torch.tensor(positions)[:, None]
        cos, sin = (table[position_ids][:, None] for table in self._tables)
        masks = layer_masks(self._config, position_ids, self._slots)
        for i, layer in enumerate(self._kept or self._streamed()):
            x, key, value = layer(x, position_ids, cos, sin, masks[i], *self._caches[i])
            self._caches[i] = (key, value)
        normed: Tensor = self._norm(x[:, 0])
        return head_logits(normed, self._head, self._config.final_softcap)

    def _streamed(self) -> Iterator[DecoderLayer]:
        """The layers, one after the other in the same storage."""
        layer = self._empty_layer()
        return self._read_layers(lambda: layer)

    def _read_layers(self, storage: Callable[[], DecoderLayer]) -> Iterator[DecoderLayer]:
        for i in range(self._config.num_layers):
            layer = storage()
            self._load(layer, f"layers.{i}")
            yield layer

    def _empty_layer(self) -> DecoderLayer:
        layer: DecoderLayer = empty_module(lambda: DecoderLayer(self._config))
        return layer

    @torch.inference_mode()
    def _load(self, module: DecoderLayer | RMSNorm, prefix: str) -> None:
        self._reference.load(module, prefix)
