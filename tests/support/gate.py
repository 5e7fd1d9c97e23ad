"""The parity gate over a random model, and a bundle of it: the decoder behind a bundle's interface."""

import numpy as np
import torch

from gemma_export.exporter.checkpoints.checkpoint import RandomCheckpoint
from gemma_export.exporter.checkpoints.weights import canonical_weights
from gemma_export.exporter.config import GemmaConfig
from gemma_export.exporter.decoder import Decoder, rotary_tables
from gemma_export.exporter.parity.gate import check_parity
from gemma_export.exporter.parity.reference import Reference

CONFIG = GemmaConfig(
    name="random",
    vocab_size=300,
    hidden_size=48,
    num_layers=3,
    num_query_heads=4,
    num_kv_heads=2,
    head_dim=16,
    intermediate_size=80,
    context_length=64,
)
CHECKPOINT = RandomCheckpoint(CONFIG, seed=5)
WEIGHTS = canonical_weights(CHECKPOINT, CONFIG)
TEXTS = [
    [2, *np.random.default_rng(i).integers(3, 300, size).tolist()]
    for i, size in enumerate((60, 47, 30, 20, 9, 1))
]


class FakeCache:
    def __init__(self, slots: int) -> None:
        self.length = 0
        shape = (1, CONFIG.num_kv_heads, slots, CONFIG.head_dim)
        self.tensors = [torch.zeros(shape) for _ in range(2 * CONFIG.num_layers)]

    def positions(self, layer):
        return range(self.length)

    def keys(self, layer):
        return self.tensors[2 * layer][:, :, : self.length].numpy()

    def values(self, layer):
        return self.tensors[2 * layer + 1][:, :, : self.length].numpy()


class FakeSession:
    """The decoder, run as a bundle is. Its methods are what planted defects replace."""

    def __init__(self, max_length=64, *, all_logits=False, config=CONFIG):
        self.max_length = max_length
        self.calls: list[int] = []
        self.decoder = Decoder(config, max_length, all_logits=all_logits).eval()
        state = {name: tensor.read(0, tensor.shape[0]).float() for name, tensor in WEIGHTS.items()}
        state["rotary_cos"], state["rotary_sin"] = rotary_tables(config, max_length)
        self.decoder.load_state_dict(state)

    def new_cache(self):
        return FakeCache(self.max_length)

    def positions(self, cache, count):
        return torch.arange(cache.length, cache.length + count)[None]

    def step(self, tokens, cache):
        assert tokens.dtype == np.int64
        assert cache.length + tokens.shape[1] <= self.max_length
        self.calls.append(tokens.shape[1])
        with torch.inference_mode():
            logits, cache.tensors = self.decoder(
                torch.from_numpy(tokens), self.positions(cache, tokens.shape[1]), cache.tensors
            )
        cache.length += tokens.shape[1]
        return logits.numpy()


def check(session, level="quick", precision="fp32", **options):
    reference = Reference(CONFIG, WEIGHTS)
    return check_parity(session, reference, TEXTS, level=level, precision=precision, bos=2, **options)
