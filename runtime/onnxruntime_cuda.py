"""The onnxruntime backend, on a GPU of NVIDIA's: all of the graph runs there, or it is not loaded.

Caches lie on the device, past and present at one address. A step brings token ids there and logits back.
"""

import re
from typing import Any

import numpy as np

from gemma_export.errors import BundleError, DeviceError, GemmaExportError, first_line
from gemma_export.runtime.backend import Ids, Logits
from gemma_export.runtime.bundle import Bundle
from gemma_export.runtime.cuda_libraries import load_cuda_provider
from gemma_export.runtime.kv_cache import STORAGE, Array, KVCache
from gemma_export.runtime.onnxruntime_graph import FATAL, LoadedGraph, ort

PROVIDER = "CUDAExecutionProvider"

_CONFIGURATION = {
    # An operator without a kernel for the device is an error: beside it, on the CPU, every step would wait.
    "session.disable_cpu_ep_fallback": "1",
    # Weights take the memory they need, not what the arena rounds that up to.
    "session.use_device_allocator_for_initializers": "1",
}
_PROVIDER_OPTIONS = {"device_id": "0", "arena_extend_strategy": "kSameAsRequested"}

_WARNING = 2  # onnxruntime's own choice of what it logs outside of sessions

_ON_THE_CPU = "assigned to the default CPU EP"
_FAILURE = re.compile(r"CUDA failure (?P<code>\d+): (?P<reason>.*?) ?;")
_NO_MEMORY = re.compile(r"CUDA failure 2:|Failed to allocate memory|out of memory", re.IGNORECASE)


class CudaBackend(LoadedGraph):
    """A `Backend` over onnxruntime's CUDA provider, on the first GPU.

    Args:
        bundle: A bundle that has been checked.

    Raises:
        BundleError: onnxruntime cannot load the graph, or not all of it for the device, or the graph has
            another contract.
        DeviceError: There is no GPU, or no driver, or the GPU's memory is too small.
        MissingDependencyError: onnxruntime is a build without CUDA, or lacks one of CUDA's libraries.
    """

    def __init__(self, bundle: Bundle) -> None:
        load_cuda_provider(ort)
        options = ort.SessionOptions()
        options.log_severity_level = FATAL
        for key, value in _CONFIGURATION.items():
            options.add_session_config_entry(key, value)
        path = bundle.file(bundle.manifest.graph.file)
        ort.set_default_logger_severity(FATAL)
        try:
            session = ort.InferenceSession(
                str(path),
                options,
                providers=[(PROVIDER, _PROVIDER_OPTIONS)],
                # Where the provider fails, onnxruntime's own Python would go on with the CPU.
                enable_fallback=0,
            )
        except Exception as error:
            # onnxruntime's exceptions share no base of their own.
            raise refusal(str(path), error, ort.__version__, ort.cuda_version) from error
        finally:
            ort.set_default_logger_severity(_WARNING)
        if PROVIDER not in session.get_providers():
            raise DeviceError(
                f"onnxruntime {ort.__version__} runs {path} with {', '.join(session.get_providers())}, "
                "without CUDA.",
                "Update the driver of the GPU, or build the bundle with --target cpu.",
            )
        super().__init__(session, bundle.manifest, "cuda")

    def run(self, input_ids: Ids, position_ids: Ids, cache: KVCache, tail: int = 1) -> Logits:
        """As `Backend.run`; several tokens of several rows are run one row after the other.

        The operator that attends to the cache takes them so only (`graphs.passes.fix_total_length`).
        """
        if min(input_ids.shape) == 1:
            return super().run(input_ids, position_ids, cache, tail)
        run = super().run
        rows = [slice(i, i + 1) for i in range(cache.batch)]
        return np.concatenate(
            [run(input_ids[row], position_ids[row], cache.row(row.start), tail) for row in rows]
        )

    def new_cache(self, batch: int) -> KVCache:
        """As `Backend.new_cache`; the memory is the device's.

        Raises:
            DeviceError: It has not enough.
        """
        model, dtype = self.manifest.model, self.manifest.cache_dtype
        shape = (batch, model.num_kv_heads, self.manifest.graph.max_length, model.head_dim)
        # Zeros: whatever else lies in a slot that is masked, times nothing, could be no number.
        zeros = np.zeros(shape, STORAGE[dtype])
        try:
            buffers = [DeviceBuffer.filled(zeros) for _ in range(2 * model.num_layers)]
        except Exception as error:
            raise DeviceError(
                f"The GPU has no memory for a cache of {batch} rows of {shape[2]} tokens, "
                f"{2 * model.num_layers * zeros.nbytes:,} bytes: {first_line(error)}",
                "Use fewer rows, or build the bundle with a smaller --max-length.",
            ) from error
        return KVCache(buffers[::2], buffers[1::2], dtype, np.zeros(batch, np.int64))


class DeviceBuffer:
    """Memory of the device that slices by rows like an array of the host.

    Args:
        owner: The OrtValue whose memory it is.
        address: Where its first row begins on the device.
        rows: Which of the owner's rows it has.
    """

    def __init__(self, owner: Any, address: int, rows: range) -> None:
        self._owner = owner
        self._rows = rows
        self.address = address

    @classmethod
    def filled(cls, array: Array) -> "DeviceBuffer":
        """A copy of an array on the device."""
        owner = ort.OrtValue.ortvalue_from_numpy(array, "cuda", 0)
        return cls(owner, owner.data_ptr(), range(len(array)))

    @property
    def shape(self) -> tuple[int, ...]:
        """As of an array."""
        return (len(self._rows), *self._owner.shape()[1:])

    def __getitem__(self, rows: slice) -> "DeviceBuffer":
        """Consecutive rows, over the same memory."""
        chosen = self._rows[rows]
        if chosen.step != 1:
            raise ValueError(f"rows of a device's memory are consecutive: {rows}")
        row_bytes = self._owner.tensor_size_in_bytes() // self._owner.shape()[0]
        offset = (chosen.start - self._rows.start) * row_bytes
        return DeviceBuffer(self._owner, self.address + offset, chosen)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        """A copy of it on the host."""
        array: Array = self._owner.numpy()[self._rows.start : self._rows.stop]
        return array if dtype is None else array.astype(dtype)


def refusal(path: str, error: Exception, version: str, cuda: str) -> GemmaExportError:
    """What to say of a session that could not be made.

    Args:
        path: The graph's file.
        error: What onnxruntime raised.
        version: onnxruntime's.
        cuda: The version of CUDA that it was built with, as in 13.0.
    """
    reason = str(error)
    if _ON_THE_CPU in reason:
        return BundleError(
            f"The CUDA provider of onnxruntime {version} has no kernel for a part of {path}.",
            "Install onnxruntime-gpu 1.31 or later; if it is, build the bundle again with --target cuda.",
        )
    if _NO_MEMORY.search(reason):
        return DeviceError(
            f"The GPU's memory is too small for the weights of {path}.",
            "Free some of it, or build the bundle with a smaller --precision.",
        )
    failure = _FAILURE.search(reason)
    if failure is not None:
        return DeviceError(
            f"onnxruntime {version} cannot use a GPU: {failure['reason']} (CUDA error {failure['code']}).",
            f"It needs an NVIDIA GPU and a driver for CUDA {cuda}; `nvidia-smi` shows both.",
        )
    return BundleError(
        f"onnxruntime {version} cannot load {path} with CUDA: {first_line(error)}",
        "Install onnxruntime-gpu 1.31 or later; if it is, build the bundle again with --target cuda.",
    )
