"""The TensorRT backend, for both flavours, on cuda-bindings: the caches lie on the device and stay there.

A layer's past and present are bound to one address, as TensorRT's cache update demands. Steps run in one
context, which takes the optimization profile that holds a step: prefill a row at a time, decode all rows.
"""

import contextlib
from dataclasses import dataclass
from itertools import accumulate
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from gemma_export.errors import BundleError, GemmaExportError, MissingDependencyError
from gemma_export.runtime.backend import INPUT_IDS, LOGITS, POSITION_IDS, Ids, Logits, cache_names
from gemma_export.runtime.bundle import Bundle
from gemma_export.runtime.cuda import ALIGNMENT, CudaDevice, DeviceArray, DeviceMemory, load_cudart
from gemma_export.runtime.kv_cache import STORAGE, KVCache
from gemma_export.runtime.manifest import EngineInfo, LogitsKind
from gemma_export.runtime.tensorrt_contract import check_contract
from gemma_export.runtime.tensorrt_engine import EXTRAS, Engine, choose_engines, load_tensorrt
from gemma_export.runtime.tensorrt_steps import Launch, capacity, plan_step

_ID = np.dtype(np.int64)
_LOGIT = np.dtype(np.float32)


class TensorRTBackend:
    """A `Backend` over the engine of a bundle that fits the device.

    Args:
        bundle: A bundle with engines, which has been checked.

    Raises:
        MissingDependencyError: cuda-bindings or the engine's TensorRT is not installed.
        DeviceError: There is no driver or device, or it has no room for the engine.
        BundleError: No engine fits the device or the installed version, or it is not what its manifest says.
    """

    def __init__(self, bundle: Bundle) -> None:
        self._manifest = bundle.manifest
        engines = bundle.manifest.engines
        if not engines:
            target = bundle.manifest.target
            raise BundleError(
                f"The bundle {bundle.path} is for {target} and has no engine.",
                f"Compile one: `gemma-export compile {bundle.path} --target {target}`.",
            )
        self._device = CudaDevice(load_cudart(EXTRAS[engines[0].flavour]))
        info, trt = _choose(engines, self._device)
        cache = bundle.path.with_name(f"{bundle.path.name}.runtime-cache") / f"sm{self._device.sm}"
        self._engine = Engine(trt, info, bundle.file(info.file), self._device, cache)
        check_contract(self._engine, info, self._manifest)
        self._profiles = info.profiles
        self._inputs = _Inputs.allocate(self._device, info)
        self._device_logits: DeviceMemory | None = None
        self._logits: WeakKeyDictionary[KVCache, Logits] = WeakKeyDictionary()
        self._bound: _Bound | None = None

    @property
    def logits(self) -> LogitsKind:
        """As `Backend.logits`."""
        return self._manifest.graph.logits

    @property
    def gives_tail(self) -> bool:
        """As `Backend.gives_tail`."""
        return self.logits == "all"

    def new_cache(self, batch: int) -> KVCache:
        """As `Backend.new_cache`; the memory is the device's, in one piece.

        Raises:
            DeviceError: The device has not enough.
            BundleError: A row is no multiple of what TensorRT aligns to, and there are several.
        """
        model, graph = self._manifest.model, self._manifest.graph
        dtype = STORAGE[self._manifest.cache_dtype]
        shapes = [
            (batch, model.num_kv_heads, slots, model.head_dim)
            for slots in graph.layer_slots(model.num_layers)
            for _ in ("key", "value")
        ]
        row_bytes = [int(np.prod(shape[1:])) * dtype.itemsize for shape in shapes]
        uneven = next((row for row in row_bytes if row % ALIGNMENT), None)
        if batch > 1 and uneven is not None:
            raise BundleError(
                f"A row of the cache has {uneven} bytes, which is no multiple of {ALIGNMENT}: TensorRT can "
                "run one row of this bundle only.",
                f"Run one text at a time, or build the bundle with a --max-length and a --prefill-chunk that "
                f"are multiples of {ALIGNMENT}.",
            )
        rows = capacity(self._profiles, batch)
        sizes = [_aligned(rows * row) for row in row_bytes]
        what = f"a cache of {batch} row{'s' * (batch > 1)} of {graph.max_length} tokens"
        memory = self._device.allocate(sum(sizes), what)
        self._device.clear(memory)
        offsets = accumulate(sizes, initial=memory.address)
        buffers = [
            DeviceArray(memory, address, shape, dtype)
            for address, shape in zip(offsets, shapes, strict=False)
        ]
        return KVCache(
            buffers[0::2],
            buffers[1::2],
            self._manifest.cache_dtype,
            np.zeros(batch, np.int64),
            max_length=graph.max_length,
            rolling=graph.rolling,
        )

    def run(self, input_ids: Ids, position_ids: Ids, cache: KVCache, tail: int = 1) -> Logits:
        """As `Backend.run`; more tokens than the prefill profile holds are run in chunks.

        The engine decides of how many tokens it gives the logits, whatever `tail` is.
        """
        batch, tokens = input_ids.shape
        logits = self._logits_of(cache, tokens if self.logits == "all" else 1)
        try:
            for launch in plan_step(self._profiles, batch, tokens):
                self._launch(launch, input_ids, position_ids, cache, logits)
        except BaseException:
            # What the context has been told is unknown now, and copies may still be under way. A device
            # that has failed altogether says so again in the next step.
            self._bound = None
            with contextlib.suppress(GemmaExportError):
                self._device.synchronize()
            raise
        return logits

    def _launch(
        self, launch: Launch, input_ids: Ids, position_ids: Ids, cache: KVCache, logits: Logits
    ) -> None:
        tokens = slice(launch.token, launch.token + launch.tokens)
        # Padding repeats the last row: what it writes lies behind the cache's rows.
        rows = np.minimum(np.arange(launch.row, launch.row + launch.padded), launch.row + launch.rows - 1)
        count = launch.tokens if self.logits == "all" else 1
        results = self._results(launch.padded * count)
        self._bind(launch, cache, results)
        self._inputs.upload(input_ids[rows, tokens], position_ids[rows, tokens])
        self._engine.execute()
        if self.logits == "all":
            self._download(results, logits[launch.row : launch.row + launch.rows, tokens])
        elif tokens.stop == input_ids.shape[1]:
            self._download(results, logits[launch.row : launch.row + launch.rows])
        self._device.synchronize()

    def _bind(self, launch: Launch, cache: KVCache, results: DeviceMemory) -> None:
        """Sets profile, shapes and addresses, unless they are those of the step before."""
        buffers = [*cache.key_buffers, *cache.value_buffers]
        addresses = tuple(buffer.address + launch.row * buffer.row_bytes for buffer in buffers)
        bound = _Bound(launch.profile, launch.padded, launch.tokens, addresses, results.address)
        if bound == self._bound:
            return
        engine = self._engine
        if self._bound is None or self._bound.profile != launch.profile:
            engine.select_profile(launch.profile)
        for name, memory in ((INPUT_IDS, self._inputs.ids), (POSITION_IDS, self._inputs.positions)):
            engine.set_shape(name, (launch.padded, launch.tokens))
            engine.set_address(name, memory.address)
        layers = self._manifest.model.num_layers
        for layer, names in enumerate(cache_names(layers)):
            for past, present, address in (
                (names[0], names[2], addresses[layer]),
                (names[1], names[3], addresses[layers + layer]),
            ):
                engine.set_shape(past, (launch.padded, *cache.key_buffers[layer].shape[1:]))
                engine.set_address(past, address)
                engine.set_address(present, address)
        engine.set_address(LOGITS, results.address)
        self._bound = bound

    def _logits_of(self, cache: KVCache, tokens: int) -> Logits:
        """Pinned memory for a step's logits, which a cache keeps as long as the steps' size is the same."""
        shape = (cache.batch, tokens, self._manifest.model.vocab_size)
        logits = self._logits.get(cache)
        if logits is None or logits.shape != shape:
            logits = self._logits[cache] = self._device.pinned(shape, _LOGIT)
        return logits

    def _results(self, tokens: int) -> DeviceMemory:
        """Where the engine puts the logits of so many tokens; it grows, and only then moves."""
        size = tokens * self._manifest.model.vocab_size * _LOGIT.itemsize
        if self._device_logits is None or self._device_logits.size < size:
            self._device_logits = None
            self._device_logits = self._device.allocate(size, f"the logits of {tokens} tokens")
        return self._device_logits

    def _download(self, results: DeviceMemory, logits: Logits) -> None:
        """Begins to copy what stands first in the results, row by row where the rows lie apart."""
        parts = [logits] if logits.flags.c_contiguous else list(logits)
        address = results.address
        for part in parts:
            self._device.download(address, part)
            address += part.nbytes


@dataclass(frozen=True)
class _Bound:
    """What the context has been told: a step of the same runs without telling it again."""

    profile: int
    rows: int
    tokens: int
    addresses: tuple[int, ...]
    logits: int


class _Inputs:
    """Token ids and positions on the device, with room for the largest launch, and what is sent there."""

    def __init__(self, device: CudaDevice, tokens: int) -> None:
        self._device = device
        self._staged_ids, self._staged_positions = (device.pinned((tokens,), _ID) for _ in range(2))
        self.ids, self.positions = (
            device.allocate(tokens * _ID.itemsize, "the tokens of a step") for _ in range(2)
        )

    @classmethod
    def allocate(cls, device: CudaDevice, info: EngineInfo) -> "_Inputs":
        return cls(device, max(profile.batch.max * profile.tokens.max for profile in info.profiles))

    def upload(self, ids: Ids, positions: Ids) -> None:
        for values, staged, memory in (
            (ids, self._staged_ids, self.ids),
            (positions, self._staged_positions, self.positions),
        ):
            part = staged[: values.size]
            part[:] = values.ravel()
            self._device.upload(part, memory.address)


def _choose(engines: tuple[EngineInfo, ...], device: CudaDevice) -> tuple[EngineInfo, Any]:
    """The first engine that fits the device and what is installed, with the module that runs it."""
    first: GemmaExportError | None = None
    for info in choose_engines(engines, device):
        try:
            return info, load_tensorrt(info)
        except (BundleError, MissingDependencyError) as error:
            first = first or error
    assert first is not None
    raise first


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
