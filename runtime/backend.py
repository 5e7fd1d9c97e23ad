"""What runs a bundle's graph: the protocol every backend keeps, and the names of the graph's tensors.

Symbols in shape comments: B rows, T new tokens, V vocabulary.
"""

from collections.abc import Iterator
from typing import Protocol

import numpy as np
import numpy.typing as npt

from gemma_export.runtime.kv_cache import KVCache
from gemma_export.runtime.manifest import LogitsKind

Ids = npt.NDArray[np.int64]
Logits = npt.NDArray[np.float32]

INPUT_IDS = "input_ids"
POSITION_IDS = "position_ids"
LOGITS = "logits"
TAIL_START = "tail_start"
TAIL_LOGITS = "tail_logits"
"""Where a graph has them: an input with a default, from which token of a step on, and the logits of those."""


def cache_names(num_layers: int) -> Iterator[tuple[str, str, str, str]]:
    """Per layer: past key, past value, present key, present value."""
    for layer in range(num_layers):
        past, present = f"past_key_values.{layer}", f"present.{layer}"
        yield f"{past}.key", f"{past}.value", f"{present}.key", f"{present}.value"


class Backend(Protocol):
    """Runs the graph of one bundle over caches of its own making.

    A backend keeps whatever it has bound to a cache for as long as that cache lives, so that a step costs
    the graph and nothing else. Checks of what a user typed are made above it.
    """

    @property
    def logits(self) -> LogitsKind:
        """Whether `run` gives the logits of the last token or of all."""
        ...

    @property
    def gives_tail(self) -> bool:
        """Whether `run` gives the logits of as many of the last tokens as it is asked for."""
        ...

    def new_cache(self, batch: int) -> KVCache:
        """An empty cache of `batch` rows where this backend can write it in place."""
        ...

    def run(self, input_ids: Ids, position_ids: Ids, cache: KVCache, tail: int = 1) -> Logits:
        """Runs T tokens per row, writing their keys and values into their slots.

        Args:
            input_ids: int64 [B, T].
            position_ids: int64 [B, T], consecutive in a row, each below the cache's `max_length`.
            cache: A cache of B rows made by `new_cache`, or a row of one. Its lengths are not changed:
                the caller advances them when it has what it came for.
            tail: Of how many of the last tokens the logits are wanted: up to T; 1 unless `gives_tail`.

        Returns:
            float32 [B, N, V], the logits of the last tokens: N is `tail`, or T where the graph gives all. A
            buffer of the backend, good until the next run over the same cache.

        Raises:
            GemmaExportError: The run failed; the cache's slots below its lengths are as they were.
        """
        ...
