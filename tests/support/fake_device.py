"""A CUDA device that is none: `cuda.bindings.runtime` over the host's memory, with CUDA's rules enforced.

What CUDA leaves undefined (memory that was freed, a copy that is not waited for, one that is not pinned)
raises `RuleBrokenError` here. What it answers with an error code is answered with it.

Nothing that is begun on a stream happens before the stream is synchronized, which is the latest that CUDA
promises: who reads a result too early, or changes an input too early, gets the wrong one.
"""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
from cuda.bindings import runtime as real

Call = tuple[Any, ...]

_OK = real.cudaError_t.cudaSuccess
_UNCLEARED = 0xFF  # as a float of any width: not a number


class RuleBrokenError(AssertionError):
    """The code did what CUDA or TensorRT leaves undefined."""


@dataclass
class Allocation:
    """A piece of memory; `kind` is device or pinned."""

    kind: str
    address: int
    size: int
    memory: np.ndarray


@dataclass
class FakeCudart:
    """The functions of `cuda.bindings.runtime` that a runtime needs, and its enums.

    Attributes:
        sm: The device's compute capability.
        driver: The driver's CUDA version in CUDA's spelling; 0 is no driver.
        devices: How many there are.
        total: Bytes of the device.
        calls: How often each function was called.
        allocations: What is allocated, by address.
    """

    sm: int = 89
    driver: int = 13000
    devices: int = 1
    total: int = 256 << 20
    calls: dict[str, int] = field(default_factory=dict)
    allocations: dict[int, Allocation] = field(default_factory=dict)

    cudaError_t = real.cudaError_t  # noqa: N815 - CUDA's own names
    cudaMemcpyKind = real.cudaMemcpyKind  # noqa: N815
    cudaDeviceAttr = real.cudaDeviceAttr  # noqa: N815
    cudaStreamNonBlocking = real.cudaStreamNonBlocking  # noqa: N815

    def __post_init__(self) -> None:
        self._streams: dict[int, list[Callable[[], None]]] = {}
        self._failures: dict[str, Any] = {}

    # What a test does with it.

    def fail(self, function: str, error: Any) -> None:
        """Lets the next call of a function fail; the work of a stream that fails is lost."""
        self._failures[function] = error

    @property
    def used(self) -> int:
        """Bytes of the device that are allocated."""
        return sum(each.size for each in self.allocations.values() if each.kind == "device")

    def memory(self, address: int, size: int, kind: str = "device") -> np.ndarray:
        """The bytes at an address, which all have to be of one living allocation."""
        for each in self.allocations.values():
            if each.address <= address < each.address + each.size:
                if each.kind != kind:
                    raise RuleBrokenError(f"{address:#x} is {each.kind} memory, not {kind} memory")
                start = address - each.address
                if start + size > each.size:
                    raise RuleBrokenError(f"{size} bytes at {address:#x} reach behind its {each.size} bytes")
                return each.memory[start : start + size]
        raise RuleBrokenError(f"{address:#x} is not allocated, or has been freed")

    def enqueue(self, stream: int, work: Callable[[], None]) -> None:
        """Begins something on a stream."""
        if stream not in self._streams:
            raise RuleBrokenError(f"{stream:#x} is no stream; TensorRT wants one that is not the default")
        self._streams[stream].append(work)

    def require_idle(self, what: str) -> None:
        """Refuses what would race with what has been begun."""
        if any(self._streams.values()):
            raise RuleBrokenError(f"{what} while work is under way")

    # What it stands for.

    def cudaDriverGetVersion(self) -> Call:  # noqa: N802
        return _OK, self.driver

    def cudaRuntimeGetVersion(self) -> Call:  # noqa: N802
        return _OK, 13000

    def cudaGetDeviceCount(self) -> Call:  # noqa: N802
        if self.driver < 13000:
            return real.cudaError_t.cudaErrorInsufficientDriver, None
        if not self.devices:
            return real.cudaError_t.cudaErrorNoDevice, None
        return _OK, self.devices

    def cudaSetDevice(self, index: int) -> Call:  # noqa: N802
        if index >= self.devices:
            return (real.cudaError_t.cudaErrorInvalidDevice,)
        return (_OK,)

    def cudaDeviceGetAttribute(self, attribute: Any, index: int) -> Call:  # noqa: N802
        major = attribute == real.cudaDeviceAttr.cudaDevAttrComputeCapabilityMajor
        return _OK, self.sm // 10 if major else self.sm % 10

    def cudaGetDeviceProperties(self, index: int) -> Call:  # noqa: N802
        return _OK, SimpleNamespace(name=b"Fake GPU")

    def cudaMemGetInfo(self) -> Call:  # noqa: N802
        return _OK, self.total - self.used, self.total

    def cudaStreamCreateWithFlags(self, flags: int) -> Call:  # noqa: N802
        handle = 0x1000 + len(self._streams)
        self._streams[handle] = []
        return _OK, real.cudaStream_t(handle)

    def cudaMalloc(self, size: int) -> Call:  # noqa: N802
        if error := self.called("cudaMalloc"):
            return error, None
        if size > self.total - self.used:
            return real.cudaError_t.cudaErrorMemoryAllocation, None
        return _OK, self._allocate("device", size)

    def cudaMallocHost(self, size: int) -> Call:  # noqa: N802
        if error := self.called("cudaMallocHost"):
            return error, None
        return _OK, self._allocate("pinned", size)

    def cudaFree(self, address: int) -> Call:  # noqa: N802
        return self._free("device", address)

    def cudaFreeHost(self, address: int) -> Call:  # noqa: N802
        return self._free("pinned", address)

    def cudaMemsetAsync(self, address: int, value: int, size: int, stream: Any) -> Call:  # noqa: N802
        def work() -> None:
            self.memory(address, size)[:] = value

        self.memory(address, size)
        self.enqueue(int(stream), work)
        return (_OK,)

    def cudaMemcpyAsync(  # noqa: N802
        self, target: int, source: int, size: int, kind: Any, stream: Any
    ) -> Call:
        if error := self.called("cudaMemcpyAsync"):
            return (error,)
        up = kind == real.cudaMemcpyKind.cudaMemcpyHostToDevice
        kinds = ("device", "pinned") if up else ("pinned", "device")

        def work() -> None:
            self.memory(target, size, kinds[0])[:] = self.memory(source, size, kinds[1])

        self.memory(target, size, kinds[0])
        self.memory(source, size, kinds[1])
        self.enqueue(int(stream), work)
        return (_OK,)

    def cudaMemcpy(self, target: int, source: int, size: int, kind: Any) -> Call:  # noqa: N802
        if kind != real.cudaMemcpyKind.cudaMemcpyDeviceToHost:
            raise RuleBrokenError(f"the fake copies from the device only, not {kind.name}")
        # A stream that does not block is not waited for by the default one.
        self.require_idle("a copy on the default stream")
        ctypes.memmove(target, self.memory(source, size).ctypes.data, size)
        return (_OK,)

    def cudaStreamSynchronize(self, stream: Any) -> Call:  # noqa: N802
        work = self._streams[int(stream)]
        if error := self.called("cudaStreamSynchronize"):
            work.clear()
            return (error,)
        while work:
            work.pop(0)()
        return (_OK,)

    def called(self, function: str) -> Any:
        self.calls[function] = self.calls.get(function, 0) + 1
        return self._failures.pop(function, None)

    def _allocate(self, kind: str, size: int) -> int:
        raw = np.full(size + 256, _UNCLEARED, np.uint8)
        start = -raw.ctypes.data % 256
        memory = raw[start : start + size]
        address = int(memory.ctypes.data)
        self.allocations[address] = Allocation(kind, address, size, memory)
        return address

    def _free(self, kind: str, address: int) -> Call:
        self.require_idle("memory is freed")
        found = self.allocations.get(address)
        if found is None or found.kind != kind:
            raise RuleBrokenError(f"{address:#x} is freed, which is no {kind} allocation")
        del self.allocations[address]
        return (_OK,)
