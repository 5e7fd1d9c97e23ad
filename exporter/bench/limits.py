"""What the machine allows at best: the time that reading takes, or arithmetic, whichever is longer.

Decoding a token reads every weight and all that it sees of the cache; the time for that is the limit. A
prompt reads the weights once for every chunk and computes: each weight is multiplied and added for each
token, those of the head for the last one, and every query meets the keys and values before it. That is the
roofline model (Williams, Waterman and Patterson, 2009), with rates that were measured. A model that a cache
of the processor holds may go beyond: its weights are not read from memory.
"""

from gemma_export.exporter.bench.values import Machine, Timing
from gemma_export.runtime.manifest import Manifest

_MULTIPLY_ADD = 2
"""Operations."""


def bytes_per_token(manifest: Manifest, depth: float) -> float:
    """What decoding a token must read: weights as they are stored, the head among them, and the filled cache.

    Of the embedding table the lookup takes one row: a few kilobytes, which are not counted. A layer whose
    cache rolls sees no more than its window.

    Args:
        manifest: The bundle's.
        depth: Filled slots, those of the token itself among them.
    """
    graph, layers = manifest.graph, manifest.model.num_layers
    seen = layers * depth
    if (rolling := graph.rolling) is not None:
        seen -= len(rolling.layers) * max(0, depth - rolling.window)
    per_slot = manifest.bytes.cache_per_row / sum(graph.layer_slots(layers))
    return manifest.bytes.per_token + seen * per_slot


def decode_seconds(manifest: Manifest, timing: Timing, read: float) -> float:
    """The least time that decoding takes, at the rate measured beside it, or else `read` bytes per second."""
    rate = read if timing.read is None else timing.read
    middle = timing.at + (timing.tokens + 1) / 2  # A token reads its own keys and values, too.
    return timing.tokens * bytes_per_token(manifest, middle) / rate


def prefill_seconds(manifest: Manifest, machine: Machine, timing: Timing, chunk: int) -> float | None:
    """The least time that a prompt takes; None where no rate of matrices is known."""
    rate = machine.integers if manifest.storage_dtype in ("int8", "int4") else machine.floats
    if rate is None or machine.floats is None:
        return None
    arithmetic = product_operations(manifest, timing.tokens) / rate
    arithmetic += attention_operations(manifest, timing.tokens) / machine.floats
    steps = -(-timing.tokens // chunk)
    return max(arithmetic, steps * manifest.bytes.per_token / machine.read)


def product_operations(manifest: Manifest, tokens: int) -> int:
    """Operations of all products with weights, for a prompt whose last token's logits are wanted."""
    model = manifest.model
    heads = tokens if manifest.graph.logits == "all" else 1
    products = tokens * model.parameters.other + heads * model.vocab_size * model.hidden_size
    return _MULTIPLY_ADD * products


def attention_operations(manifest: Manifest, tokens: int) -> int:
    """Operations of queries with keys and of probabilities with values, behind an empty cache."""
    model = manifest.model
    pairs = tokens * (tokens + 1) // 2
    return 2 * _MULTIPLY_ADD * model.num_layers * model.num_query_heads * model.head_dim * pairs
