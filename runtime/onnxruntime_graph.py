"""What onnxruntime's backends share: a loaded graph, and its caches bound to it.

Past and present of a layer are bound to one address, so the graph writes the new slots in place. The inputs
and the logits of a step have buffers of their own, bound once per cache and shape. Where these and the caches
lie, the host or a device, is the only difference between the providers.
"""

import math
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from gemma_export.errors import GemmaExportError, MissingDependencyError, first_line
from gemma_export.runtime.backend import (
    INPUT_IDS,
    LOGITS,
    POSITION_IDS,
    TAIL_LOGITS,
    TAIL_START,
    Ids,
    Logits,
    cache_names,
)
from gemma_export.runtime.kv_cache import KVCache
from gemma_export.runtime.manifest import LogitsKind, Manifest
from gemma_export.runtime.onnxruntime_contract import check_contract
from gemma_export.runtime.speculation import LONGEST_DRAFT

try:
    import onnxruntime as ort
except ImportError as error:
    raise MissingDependencyError(
        "Running a bundle needs onnxruntime, which is not installed.",
        "Install it with `pip install 'gemma-export[cpu]'`; for a bundle with the target cuda, with "
        "`pip install 'gemma-export[cuda]'`.",
    ) from error

__all__ = ["ELEMENT_TYPE", "FATAL", "LoadedGraph", "ort"]

ELEMENT_TYPE = {"float32": 1, "int8": 3, "int64": 7, "float16": 10, "bfloat16": 16}
"""TensorProto.DataType of the ONNX specification."""

FATAL = 4
"""onnxruntime's log level: what it logs as an error it also raises, and we tell it once."""


class LoadedGraph:
    """A bundle's graph in an onnxruntime session; the providers' backends add where a cache is allocated.

    Args:
        session: An `onnxruntime.InferenceSession`.
        manifest: The bundle's.
        device: Where caches and inputs lie, as onnxruntime calls it: `cpu` or `cuda`.

    Raises:
        BundleError: The graph is not the one that the manifest describes.
    """

    def __init__(self, session: Any, manifest: Manifest, device: str) -> None:
        self._has_tail = check_contract(session, manifest)
        self.manifest = manifest
        self.session = session
        self.device = device
        self._bound: WeakKeyDictionary[KVCache, _Binding] = WeakKeyDictionary()

    @property
    def logits(self) -> LogitsKind:
        """As `Backend.logits`."""
        return self.manifest.graph.logits

    @property
    def gives_tail(self) -> bool:
        """As `Backend.gives_tail`."""
        return self._has_tail or self.logits == "all"

    def run(self, input_ids: Ids, position_ids: Ids, cache: KVCache, tail: int = 1) -> Logits:
        """As `Backend.run`."""
        binding = self._bound.get(cache)
        if binding is None:
            binding = _Binding(self.session, self.manifest, self.device, cache, has_tail=self._has_tail)
            self._bound[cache] = binding
        return binding.run(input_ids, position_ids, tail)


class _Binding:
    """A cache bound to the graph, with the buffers of its steps; holds the cache's memory, not the cache."""

    def __init__(
        self, session: Any, manifest: Manifest, device: str, cache: KVCache, *, has_tail: bool
    ) -> None:
        self._session = session
        self._device = device
        self._batch = cache.batch
        self._vocabulary = manifest.model.vocab_size
        self._all_logits = manifest.graph.logits == "all"
        self._has_tail = has_tail
        self._binding = session.io_binding()
        # Memory that onnxruntime points into has to outlive the binding.
        self._memory: list[Any] = [*cache.key_buffers, *cache.value_buffers]
        names = cache_names(manifest.model.num_layers)
        for layer, (past_key, past_value, key, value) in enumerate(names):
            self._bind_cache(past_key, key, cache.key_buffers[layer], cache.dtype)
            self._bind_cache(past_value, value, cache.value_buffers[layer], cache.dtype)
        self._room: Logits = np.empty(0, np.float32)
        self._bind_step(1, 1)

    def run(self, input_ids: Ids, position_ids: Ids, tail: int) -> Logits:
        if (input_ids.shape[1], tail) != self._step:
            self._bind_step(input_ids.shape[1], tail)
        self._input_ids.update_inplace(np.ascontiguousarray(input_ids))
        self._position_ids.update_inplace(np.ascontiguousarray(position_ids))
        try:
            self._session.run_with_iobinding(self._binding)
        except Exception as error:
            raise GemmaExportError(
                f"onnxruntime could not run tokens {list(input_ids.shape)}: {first_line(error)}",
                "If memory ran out, use a shorter prompt, a smaller prefill chunk or a smaller batch.",
            ) from error
        return self._logits

    def _bind_cache(self, past: str, present: str, buffer: Any, dtype: str) -> None:
        where = (self._device, 0, ELEMENT_TYPE[dtype], buffer.shape, _address(buffer))
        self._binding.bind_input(past, *where)
        self._binding.bind_output(present, *where)

    def _bind_step(self, tokens: int, tail: int) -> None:
        """Buffers for steps of `tokens` tokens per row; decoding sets them up once."""
        self._step = (tokens, tail)
        self._input_ids = self._bind_ids(INPUT_IDS, (self._batch, tokens))
        self._position_ids = self._bind_ids(POSITION_IDS, (self._batch, tokens))
        if self._has_tail:
            start = ort.OrtValue.ortvalue_from_numpy(np.array([-tail], np.int64))
            self._binding.bind_ortvalue_input(TAIL_START, start)
        shape = (self._batch, tokens if self._all_logits else tail, self._vocabulary)
        size = math.prod(shape)
        # Steps with drafts differ in length from one to the next: what is there is used again, unless it was
        # made for much more, as a prompt whose logits are all given.
        if not size <= self._room.size <= size * (1 + LONGEST_DRAFT):
            self._room = np.empty(size, np.float32)
        self._logits: Logits = self._room[:size].reshape(shape)
        # On the host, wherever they are made.
        where = ("cpu", 0, ELEMENT_TYPE["float32"], shape, _address(self._logits))
        self._binding.bind_output(TAIL_LOGITS if self._has_tail else LOGITS, *where)

    def _bind_ids(self, name: str, shape: tuple[int, int]) -> Any:
        value = ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, np.int64), self._device, 0)
        self._binding.bind_ortvalue_input(name, value)
        return value


def _address(buffer: Any) -> int:
    """Where a cache buffer or an array begins, on the device or the host."""
    address: int = buffer.ctypes.data if isinstance(buffer, np.ndarray) else buffer.address
    return address
