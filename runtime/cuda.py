"""A CUDA device, over cuda-bindings: memory, copies and one stream, with its errors as sentences."""

import importlib
from typing import Any
from weakref import finalize

import numpy as np

from gemma_export.errors import DeviceError, MissingDependencyError
from gemma_export.runtime.kv_cache import Array

ALIGNMENT = 256
"""Bytes: what TensorRT asks of every address, and what cudaMalloc gives."""


class CudaDevice:
    """One device and the stream on which everything is done, in order.

    Memory is given back when the object that holds it is gone.

    Args:
        cudart: The module `cuda.bindings.runtime`, or what behaves like it.
        index: Which device, of those that CUDA_VISIBLE_DEVICES leaves.

    Attributes:
        name: The product's name.
        sm: Its compute capability, as in 89 for 8.9.
        driver: The CUDA version its driver has, as in "13.0".
        stream: The stream's handle.

    Raises:
        DeviceError: There is no driver, one that is too old, or no device.
    """

    def __init__(self, cudart: Any, index: int = 0) -> None:
        self._cudart = cudart
        self.driver = _version(_call(cudart.cudaDriverGetVersion()))
        self._check_device(index)
        _call(cudart.cudaSetDevice(index), "select the device")
        attributes = cudart.cudaDeviceAttr
        major, minor = (
            _call(cudart.cudaDeviceGetAttribute(attribute, index), "ask for its compute capability")
            for attribute in (
                attributes.cudaDevAttrComputeCapabilityMajor,
                attributes.cudaDevAttrComputeCapabilityMinor,
            )
        )
        self.sm: int = 10 * major + minor
        name = _call(cudart.cudaGetDeviceProperties(index), "ask for its name").name
        self.name: str = name.decode() if isinstance(name, bytes) else str(name)
        # The legacy default stream waits for every other one.
        stream = _call(cudart.cudaStreamCreateWithFlags(cudart.cudaStreamNonBlocking), "make a stream")
        self._stream = stream
        self.stream = int(stream)

    def __str__(self) -> str:
        return f"{self.name} (SM {self.sm}, CUDA {self.driver})"

    def free_memory(self) -> tuple[int, int]:
        """Bytes of the device that are free, and all it has."""
        free, total = _call(self._cudart.cudaMemGetInfo(), "ask how much memory is free")
        return free, total

    def allocate(self, size: int, what: str) -> "DeviceMemory":
        """Memory of the device, not cleared.

        Args:
            size: Bytes, at least 1.
            what: What it is for, to be told where there is not enough.

        Raises:
            DeviceError: There is not enough.
        """
        error, *address = self._cudart.cudaMalloc(size)
        if error == self._cudart.cudaError_t.cudaErrorMemoryAllocation:
            raise self.out_of_memory(size, what)
        return DeviceMemory(self, self._cudart, _call((error, *address), f"allocate {what}"), size)

    def out_of_memory(self, size: int, what: str) -> DeviceError:
        """The error that says so, with the numbers."""
        free, total = self.free_memory()
        return DeviceError(
            f"{self.name} has no room for {what}: {_mebibytes(size)} are needed, {_mebibytes(free)} of "
            f"{_mebibytes(total)} are free.",
            "End what else runs on the device, use fewer rows at once, or build the bundle with a smaller "
            "--max-length or fewer bits.",
        )

    def pinned(self, shape: tuple[int, ...], dtype: Any) -> Array:
        """An array, not cleared, in page-locked memory of the host, which the device reads and writes itself.

        Raises:
            DeviceError: The host has not enough.
        """
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        address = _call(self._cudart.cudaMallocHost(size), f"lock {_mebibytes(size)} of the host's memory")
        memory = np.asarray(_HostMemory(self._cudart, int(address), size))
        array: Array = memory.view(dtype).reshape(shape)
        return array

    def clear(self, memory: "DeviceMemory") -> None:
        """Sets every byte to 0, and waits until it is done."""
        what = "clear memory"
        _call(self._cudart.cudaMemsetAsync(memory.address, 0, memory.size, self._stream), what)
        self.synchronize()

    def upload(self, array: Array, address: int) -> None:
        """Begins to copy a pinned, contiguous array to the device; it must stay as it is until then."""
        self._copy_async(address, array.ctypes.data, array.nbytes, "cudaMemcpyHostToDevice")

    def download(self, address: int, array: Array) -> None:
        """Begins to copy from the device into a pinned, contiguous array."""
        self._copy_async(array.ctypes.data, address, array.nbytes, "cudaMemcpyDeviceToHost")

    def read(self, address: int, array: Array) -> None:
        """Copies from the device into any contiguous array, after what is under way."""
        self.synchronize()
        kind = self._cudart.cudaMemcpyKind.cudaMemcpyDeviceToHost
        _call(self._cudart.cudaMemcpy(array.ctypes.data, address, array.nbytes, kind), "copy from it")

    def synchronize(self) -> None:
        """Waits until all that was begun is done.

        Raises:
            DeviceError: Some of it failed.
        """
        _call(self._cudart.cudaStreamSynchronize(self._stream), "finish what was begun")

    def _copy_async(self, target: int, source: int, size: int, kind: str) -> None:
        direction = getattr(self._cudart.cudaMemcpyKind, kind)
        _call(self._cudart.cudaMemcpyAsync(target, source, size, direction, self._stream), "begin a copy")

    def _check_device(self, index: int) -> None:
        errors = self._cudart.cudaError_t
        error, *count = self._cudart.cudaGetDeviceCount()
        if error == errors.cudaErrorInsufficientDriver:
            needed = _version(_call(self._cudart.cudaRuntimeGetVersion()))
            if self.driver == "0.0":
                raise DeviceError(
                    "This machine has no NVIDIA driver; the bundle's engines run on an NVIDIA GPU only.",
                    "Run it where there is one; to run on a CPU, build the bundle with --target cpu.",
                )
            raise DeviceError(
                f"The NVIDIA driver has CUDA {self.driver}; the installed cuda-bindings need {needed}.",
                "Update the driver, or install the cuda-bindings of its CUDA version.",
            )
        if error == errors.cudaErrorNoDevice or (error == errors.cudaSuccess and count[0] <= index):
            raise DeviceError(
                "The NVIDIA driver finds no GPU.", "Look at `nvidia-smi`; CUDA_VISIBLE_DEVICES may hide it."
            )
        _call((error, *count), "count the devices")


class DeviceMemory:
    """Memory of a device, given back when this object is gone.

    Attributes:
        device: Whose it is.
        address: Where it begins, a multiple of `ALIGNMENT`.
        size: Bytes.
    """

    def __init__(self, device: CudaDevice, cudart: Any, address: Any, size: int) -> None:
        self.device = device
        self.address = int(address)
        self.size = size
        finalize(self, cudart.cudaFree, self.address).atexit = False  # The process's end frees it as well.


class DeviceArray:
    """A C-contiguous array in a device's memory; a slice of its rows is another over the same memory.

    Args:
        memory: Holds it; kept as long as this array or a slice of it lives.
        address: Of the first element.
        shape: Its sizes.
        dtype: numpy's dtype of what is stored.
    """

    def __init__(
        self, memory: DeviceMemory, address: int, shape: tuple[int, ...], dtype: "np.dtype[Any]"
    ) -> None:
        self._memory = memory
        self.address = address
        self.shape = shape
        self.dtype = dtype

    @property
    def row_bytes(self) -> int:
        """From one row to the next."""
        return int(np.prod(self.shape[1:])) * self.dtype.itemsize

    def __getitem__(self, rows: slice, /) -> "DeviceArray":
        start, stop, step = rows.indices(self.shape[0])
        if step != 1:
            raise ValueError(f"rows are contiguous; the step is {step}")
        shape = (max(stop - start, 0), *self.shape[1:])
        return DeviceArray(self._memory, self.address + start * self.row_bytes, shape, self.dtype)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        if copy is False:
            raise ValueError("what is on a device can only be copied")
        array = np.empty(self.shape, self.dtype)
        self._memory.device.read(self.address, array)
        return array if dtype is None else array.astype(dtype)


class _HostMemory:
    """Page-locked memory, given back when the last array over it is gone."""

    def __init__(self, cudart: Any, address: int, size: int) -> None:
        self.__array_interface__ = {
            "shape": (size,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
        }
        finalize(self, cudart.cudaFreeHost, address).atexit = False


def load_cudart(extra: str) -> Any:
    """The module `cuda.bindings.runtime`; `extra` is what installs it.

    Raises:
        MissingDependencyError: It is not installed.
    """
    try:
        return importlib.import_module("cuda.bindings.runtime")
    except ImportError as error:
        raise MissingDependencyError(
            "Running an engine needs cuda-bindings, which is not installed.",
            f"Install it with `pip install 'gemma-export[{extra}]'`.",
        ) from error


def _call(result: tuple[Any, ...], what: str = "answer") -> Any:
    """The values of a CUDA call, or its error as a sentence."""
    error, *values = result
    if int(error):
        raise DeviceError(
            f"The CUDA device could not {what}: {error.name} ({int(error)}).",
            "Load the bundle again; if it stays so, look at `nvidia-smi` and the system's log.",
        )
    return values[0] if len(values) == 1 else tuple(values)


def _version(number: int) -> str:
    """CUDA's own spelling, 1000 · major + 10 · minor."""
    return f"{number // 1000}.{number % 1000 // 10}"


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB"
