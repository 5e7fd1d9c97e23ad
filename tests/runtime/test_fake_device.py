"""The fake device and the fake TensorRT refuse what the real ones leave undefined, and have their names."""

import ctypes
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.fake_device import FakeCudart, RuleBrokenError
from support.fake_tensorrt import (
    CudaGraphStrategy,
    FakeContext,
    FakeEngine,
    FakeRuntime,
    FakeRuntimeCache,
    FakeRuntimeConfig,
    FakeTensorRT,
    ILogger,
    TensorIOMode,
)

from gemma_export.runtime.bundle import open_bundle
from gemma_export.runtime.onnxruntime import OnnxRuntimeBackend

IDS = np.array([[5, 9, 300]])


class Log(ILogger):
    def __init__(self) -> None:
        self.messages: list[str] = []

    def log(self, severity: ILogger.Severity, msg: str) -> None:
        self.messages.append(msg)


class Bench:
    """A context of the small graph with everything bound, and the calls that bind it."""

    def __init__(self, bundle: Path) -> None:
        self.cudart = FakeCudart()
        self.module = FakeTensorRT(self.cudart)
        self.log = Log()
        content = (bundle / "engines" / "model.engine").read_bytes()
        engine = FakeRuntime(self.module, self.log).deserialize_cuda_engine(content)
        assert engine is not None
        self.engine = engine
        self.stream = int(self.cudart.cudaStreamCreateWithFlags(1)[1])
        context = engine.create_execution_context()
        assert context is not None
        self.context = context
        self.ids, self.positions, self.logits = (self.allocate(8 * count) for count in (8, 8, 4 * 2048))
        self.caches = [self.allocate(2 * 64 * 16 * 4) for _ in range(4)]

    def allocate(self, size: int) -> int:
        address: int = self.cudart.cudaMalloc(size)[1]
        self.cudart.memory(address, size)[:] = 0
        return address

    def write(self, address: int, values: np.ndarray) -> None:
        self.cudart.memory(address, values.nbytes)[:] = np.frombuffer(values.tobytes(), np.uint8)

    def bind(self, tokens: int = 3) -> None:
        context = self.context
        for name, address in (("input_ids", self.ids), ("position_ids", self.positions)):
            assert context.set_input_shape(name, (1, tokens))
            assert context.set_tensor_address(name, address)
        for index, address in enumerate(self.caches):
            name = f"{index // 2}.{'key' if index % 2 == 0 else 'value'}"
            assert context.set_input_shape(f"past_key_values.{name}", (1, 2, 64, 16))
            assert context.set_tensor_address(f"past_key_values.{name}", address)
            assert context.set_tensor_address(f"present.{name}", address)
        assert context.set_tensor_address("logits", self.logits)

    def run(self) -> np.ndarray:
        assert self.context.execute_async_v3(self.stream)
        self.cudart.cudaStreamSynchronize(self.stream)
        return self.cudart.memory(self.logits, 4 * 2048).view(np.float32)


@pytest.fixture
def bench(engine_bundle: Path) -> Bench:
    made = Bench(engine_bundle)
    made.write(made.ids, IDS)
    made.write(made.positions, np.arange(3))
    made.bind()
    return made


def test_it_computes_what_the_graph_says(bench: Bench, engine_bundle: Path) -> None:
    backend = OnnxRuntimeBackend(open_bundle(engine_bundle, check="sizes"), threads=1)
    wanted = backend.run(IDS, np.arange(3)[None], backend.new_cache(1))
    np.testing.assert_array_equal(bench.run(), wanted[0, 0])
    assert bench.cudart.memory(bench.caches[0], 2 * 64 * 16 * 4).any()


def test_nothing_happens_before_the_stream_is_synchronized(bench: Bench) -> None:
    assert bench.context.execute_async_v3(bench.stream)
    assert not bench.cudart.memory(bench.logits, 8).any()
    bench.write(bench.ids, IDS + 1)  # Too early: the step reads these.
    bench.cudart.cudaStreamSynchronize(bench.stream)
    late = bench.cudart.memory(bench.logits, 4 * 2048).copy()
    bench.write(bench.ids, IDS)
    assert (late.view(np.float32) != bench.run()).any()


BROKEN: dict[str, tuple[Callable[[Bench], object], str]] = {
    "past and present apart": (
        lambda bench: (bench.context.set_tensor_address("present.0.key", bench.caches[1]), bench.run()),
        "present.0.key is not at the address of past_key_values.0.key",
    ),
    "an address that is not aligned": (
        lambda bench: bench.context.set_tensor_address("logits", bench.logits + 128),
        "not aligned to 256 bytes",
    ),
    "a buffer that is too small": (
        lambda bench: (bench.context.set_tensor_address("logits", bench.allocate(4 * 2047)), bench.run()),
        "8192 bytes at .* reach behind its 8188 bytes",
    ),
    "ids of four bytes": (
        lambda bench: (bench.context.set_tensor_address("input_ids", bench.allocate(3 * 4)), bench.run()),
        "24 bytes at .* reach behind its 12 bytes",
    ),
    "memory that was freed": (
        lambda bench: (bench.cudart.cudaFree(bench.caches[2]), bench.run()),
        "not allocated, or has been freed",
    ),
    "memory that is freed under a step": (
        lambda bench: (bench.context.execute_async_v3(bench.stream), bench.cudart.cudaFree(bench.caches[2])),
        "memory is freed while work is under way",
    ),
    "memory of the host": (
        lambda bench: (
            bench.context.set_tensor_address("logits", bench.cudart.cudaMallocHost(4 * 2048)[1]),
            bench.run(),
        ),
        "is pinned memory, not device memory",
    ),
    "rows that differ": (
        lambda bench: (bench.context.shapes.update({"past_key_values.1.key": (2, 2, 64, 16)}), bench.run()),
        "past_key_values.1.key has 2 rows, the tokens have 1",
    ),
    "ids and positions that differ": (
        lambda bench: (bench.context.set_input_shape("position_ids", (1, 2)), bench.run()),
        r"position_ids are \(1, 2\), not \(1, 3\)",
    ),
    "a position behind the last slot": (
        lambda bench: (bench.write(bench.positions, np.arange(62, 65)), bench.run()),
        "position 64 is written to 64 slots",
    ),
    "the default stream": (lambda bench: bench.context.execute_async_v3(0), "no stream"),
    "a profile for two contexts": (
        lambda bench: bench.engine.create_execution_context().set_optimization_profile_async(  # type: ignore[union-attr]
            0, bench.stream
        ),
        "profile 0 is in use by another context",
    ),
    "a copy from memory that is not pinned": (
        lambda bench: copy_up(bench, np.zeros(4, np.uint8).ctypes.data, 4),
        "not allocated",
    ),
    "a copy that is too long": (
        lambda bench: copy_up(bench, bench.cudart.cudaMallocHost(16)[1], 17),
        "17 bytes at .* reach behind its 16 bytes",
    ),
    "a copy while work is under way": (
        lambda bench: (bench.context.execute_async_v3(bench.stream), copy_down(bench)),
        "while work is under way",
    ),
    "memory that is freed twice": (
        lambda bench: (bench.cudart.cudaFree(bench.ids), bench.cudart.cudaFree(bench.ids)),
        "no device allocation",
    ),
    "memory that is freed as another kind": (
        lambda bench: bench.cudart.cudaFreeHost(bench.ids),
        "no pinned allocation",
    ),
    "memory that is freed in the middle": (
        lambda bench: bench.cudart.cudaFree(bench.ids + 8),
        "no device allocation",
    ),
}


def copy_up(bench: Bench, source: int, size: int) -> Any:
    kind = bench.cudart.cudaMemcpyKind.cudaMemcpyHostToDevice
    return bench.cudart.cudaMemcpyAsync(bench.logits, source, size, kind, bench.stream)


def copy_down(bench: Bench) -> Any:
    target = ctypes.create_string_buffer(4)
    kind = bench.cudart.cudaMemcpyKind.cudaMemcpyDeviceToHost
    return bench.cudart.cudaMemcpy(ctypes.addressof(target), bench.logits, 4, kind)


@pytest.mark.parametrize(("act", "message"), BROKEN.values(), ids=BROKEN)
def test_what_is_undefined_raises(bench: Bench, act: Callable[[Bench], object], message: str) -> None:
    with pytest.raises(RuleBrokenError, match=message):
        act(bench)


REFUSED: dict[str, tuple[Callable[[Bench], bool], str]] = {
    "a shape outside the profile": (
        lambda bench: bench.context.set_input_shape("input_ids", (1, 9)),
        r"input_ids \[1, 9\] is outside profile 0",
    ),
    "a shape of another rank": (
        lambda bench: bench.context.set_input_shape("input_ids", (3,)),
        "outside profile 0",
    ),
    "a shape of no input": (lambda bench: bench.context.set_input_shape("logits", (1, 1)), "no input logits"),
    "an address of no tensor": (
        lambda bench: bench.context.set_tensor_address("attention_mask", bench.ids),
        "no tensor attention_mask",
    ),
    "no such profile": (
        lambda bench: bench.context.set_optimization_profile_async(2, bench.stream),
        "no profile 2",
    ),
    "shapes of the profile before": (
        lambda bench: (
            bench.context.set_optimization_profile_async(1, bench.stream)
            and bench.context.execute_async_v3(bench.stream)
        ),
        "shape of input_ids has not been set",
    ),
    "a tensor without an address": (
        lambda bench: bench.context.addresses.pop("logits") and bench.context.execute_async_v3(bench.stream),
        "logits has no address",
    ),
}


@pytest.mark.parametrize(("act", "message"), REFUSED.values(), ids=REFUSED)
def test_what_tensorrt_refuses_is_refused(bench: Bench, act: Callable[[Bench], bool], message: str) -> None:
    assert act(bench) is False
    (said,) = bench.log.messages
    assert re.search(message, said)


def test_a_context_of_its_own_takes_a_free_profile(bench: Bench) -> None:
    second = bench.engine.create_execution_context()
    assert second is not None
    assert not second.set_input_shape("input_ids", (1, 1))  # It has none yet.
    assert second.set_optimization_profile_async(1, bench.stream)
    assert second.set_input_shape("input_ids", (1, 1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda bench: setattr(bench.cudart, "sm", 86), "incompatible device"),
        (lambda bench: setattr(bench.module, "__version__", "1.8"), "not compatible with this version"),
        (lambda bench: setattr(bench.cudart, "total", 0), "could not be allocated"),
    ],
    ids=["another device", "another version", "no memory"],
)
def test_an_engine_that_cannot_be_loaded(
    bench: Bench, engine_bundle: Path, change: Callable[[Bench], None], message: str
) -> None:
    change(bench)
    content = (engine_bundle / "engines" / "model.engine").read_bytes()
    assert FakeRuntime(bench.module, bench.log).deserialize_cuda_engine(content) is None
    assert message in bench.log.messages[0]


def test_memory_begins_as_no_number() -> None:
    cudart = FakeCudart()
    address = cudart.cudaMalloc(8)[1]
    assert np.isnan(cudart.memory(address, 8).view(np.float32)).all()
    assert np.isnan(cudart.memory(address, 8).view(np.float16)).all()


def test_its_sizes_add_up() -> None:
    cudart = FakeCudart(total=1000)
    address = cudart.cudaMalloc(600)[1]
    assert cudart.cudaMemGetInfo()[1:] == (400, 1000)
    assert cudart.cudaMalloc(401)[0] == cudart.cudaError_t.cudaErrorMemoryAllocation
    cudart.cudaFree(address)
    assert cudart.cudaMemGetInfo()[1:] == (1000, 1000)


def public(kind: type) -> set[str]:
    return {name for name in vars(kind) if not name.startswith("_")}


@pytest.mark.parametrize(
    ("fake", "real"),
    [
        (FakeRuntime, "Runtime"),
        (FakeEngine, "ICudaEngine"),
        (FakeContext, "IExecutionContext"),
        (FakeRuntimeConfig, "IRuntimeConfig"),
        (FakeRuntimeCache, "IRuntimeCache"),
        (ILogger, "ILogger"),
        (CudaGraphStrategy, "CudaGraphStrategy"),
        (TensorIOMode, "TensorIOMode"),
    ],
)
def test_tensorrt_has_every_name_of_the_fake(fake: type, real: str) -> None:
    tensorrt_rtx = pytest.importorskip("tensorrt_rtx")
    assert {name for name in public(fake) if not hasattr(getattr(tensorrt_rtx, real), name)} == set()


def test_tensorrt_takes_the_arguments_that_the_fake_takes() -> None:
    tensorrt_rtx = pytest.importorskip("tensorrt_rtx")
    for fake, real in ((FakeContext, "IExecutionContext"), (FakeEngine, "ICudaEngine")):
        for name in public(fake) & set(dir(getattr(tensorrt_rtx, real))):
            method = getattr(fake, name)
            signature = getattr(tensorrt_rtx, real).__dict__[name].__doc__ or ""
            if callable(method):
                names = method.__code__.co_varnames[1 : method.__code__.co_argcount]
                assert all(f"{argument}:" in signature for argument in names), (name, names)


def test_cuda_bindings_have_every_name_of_the_fake() -> None:
    from cuda.bindings import runtime

    names = {name for name in public(FakeCudart) if name.startswith("cuda")}
    assert len(names) > 15
    assert {name for name in names if not hasattr(runtime, name)} == set()
