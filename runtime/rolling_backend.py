"""A backend whose caches roll: steps are run in parts that keep them exact."""

import numpy as np

from gemma_export.runtime.backend import Backend, Ids, Logits
from gemma_export.runtime.kv_cache import KVCache
from gemma_export.runtime.manifest import LogitsKind


class RollingBackend:
    """A `Backend` over another one, for a graph with rolling caches.

    Args:
        backend: Runs the graph; a step of it must be one that the caches allow.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    @property
    def logits(self) -> LogitsKind:
        """As `Backend.logits`."""
        return self._backend.logits

    @property
    def gives_tail(self) -> bool:
        """As `Backend.gives_tail`."""
        return self._backend.gives_tail

    def new_cache(self, batch: int) -> KVCache:
        """As `Backend.new_cache`."""
        return self._backend.new_cache(batch)

    def run(self, input_ids: Ids, position_ids: Ids, cache: KVCache, tail: int = 1) -> Logits:
        """As `Backend.run`, in as many parts as the cache asks for.

        Raises:
            OverwrittenError: The cache does not hold any more what a position sees; nothing was run.
        """
        parts = cache.begin(position_ids)
        if len(parts) == 1:
            return self._backend.run(input_ids, position_ids, cache, tail)
        tokens = input_ids.shape[1]
        first = 0 if self.logits == "all" else tokens - tail  # The first token whose logits are wanted.
        kept = []
        for part in parts:
            wanted = part.stop - max(part.start, first)
            ids, positions = input_ids[:, part], position_ids[:, part]
            logits = self._backend.run(ids, positions, cache, max(1, wanted))
            if wanted > 0:
                kept.append(logits[:, -wanted:].copy())
        return np.concatenate(kept, axis=1)
