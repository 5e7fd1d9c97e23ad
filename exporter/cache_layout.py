"""Which caches of a build roll, and how many slots they have.

A local layer sees its window and no more, so its cache may roll (`runtime.rolling`): it has room for the
window and for a step's tokens, in whole steps, so that a prompt's chunks end where the cache ends.
"""

from gemma_export.errors import UsageError
from gemma_export.exporter.config import GemmaConfig
from gemma_export.runtime.rolling import RollingCache


def rolling_cache(config: GemmaConfig, max_length: int, chunk: int, element_bytes: int) -> RollingCache:
    """The caches of a model's local layers, all of which roll.

    Args:
        config: The model's shape.
        max_length: Positions of a row, and slots of every other layer.
        chunk: The most tokens of a step.
        element_bytes: Of one number in the cache.

    Raises:
        UsageError: The model has no local layers, or their caches would be no shorter.
    """
    window = config.sliding_window
    layers = tuple(i for i, seen in enumerate(config.windows) if seen is not None)
    if window is None or not layers:
        raise UsageError(
            f"No cache of {config.name} can roll: all of its layers see all tokens.",
            "Leave --local-cache out.",
        )
    slots = -(-(window + chunk - 1) // chunk) * chunk
    if slots >= max_length:
        raise UsageError(
            f"Rolling saves nothing here: a window of {window:,} tokens and a prefill chunk of {chunk:,} "
            f"take {slots:,} slots, and a row has no more than {max_length:,}.",
            "Leave --local-cache out, or give a greater --max-length.",
        )
    row = 2 * config.num_kv_heads * config.head_dim * element_bytes
    return RollingCache(layers, window, chunk, slots, len(layers) * (max_length - slots) * row)
