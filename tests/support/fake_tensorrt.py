"""A TensorRT that is none: engines are ONNX files that onnxruntime runs on a fake device's memory.

It has the names of the `tensorrt_rtx` module that a runtime needs, computes what the graph says, and holds
TensorRT's documented rules: what a call answers with False is answered so, with the error in the log; what is
undefined raises `RuleBrokenError`.
"""

import json
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import onnx
import onnxruntime as ort
from support.fake_device import FakeCudart, RuleBrokenError

_ALIGNMENT = 256
_MAGIC = b"fake engine\n"
_TYPES = {
    "tensor(int64)": ("INT64", np.int64, onnx.TensorProto.INT64),
    "tensor(float)": ("FLOAT", np.float32, onnx.TensorProto.FLOAT),
    "tensor(float16)": ("HALF", np.float16, onnx.TensorProto.FLOAT16),
    "tensor(bfloat16)": ("BF16", np.uint16, onnx.TensorProto.BFLOAT16),
}

Profiles = Sequence[Mapping[str, Sequence[Sequence[int]]]]
"""Per profile and input: the smallest, the best and the largest shape."""


def write_engine(path: Path, graph: Path, profiles: Profiles, version: str, sms: Sequence[int]) -> None:
    """Writes what `FakeTensorRT` takes for an engine."""
    header = json.dumps({"profiles": list(profiles), "version": version, "sms": list(sms)}).encode()
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(_MAGIC + header + b"\n" + onnx.load(graph).SerializeToString())


class TensorIOMode(Enum):
    INPUT = 1
    OUTPUT = 2


class CudaGraphStrategy(Enum):
    DISABLED = 0
    WHOLE_GRAPH_CAPTURE = 1


class ILogger:
    class Severity(Enum):
        INTERNAL_ERROR = 0
        ERROR = 1
        WARNING = 2
        INFO = 3
        VERBOSE = 4

    def log(self, severity: "ILogger.Severity", msg: str) -> None:
        raise NotImplementedError


class FakeTensorRT:
    """The module: `tensorrt_rtx`; with `rtx=False` `tensorrt`, without a runtime cache and CUDA graphs."""

    ILogger = ILogger
    CudaGraphStrategy = CudaGraphStrategy

    def __init__(self, cudart: FakeCudart, version: str = "1.7.1.116", *, rtx: bool = True) -> None:
        self.__version__ = version
        self.cudart = cudart
        self.rtx = rtx
        self.engines: list[FakeEngine] = []

    def Runtime(self, logger: ILogger) -> "FakeRuntime":  # noqa: N802 - the module's own name
        return FakeRuntime(self, logger)


class FakeRuntime:
    def __init__(self, trt: FakeTensorRT, logger: ILogger) -> None:
        self._trt = trt
        self.logger = logger

    def deserialize_cuda_engine(self, serialized_engine: Any) -> "FakeEngine | None":
        content = bytes(serialized_engine)
        if not content.startswith(_MAGIC):
            return self._refuse("Serialization assertion header.magicTag == kEXPECTED_MAGIC_TAG failed.")
        header, graph = content[len(_MAGIC) :].split(b"\n", 1)
        facts = json.loads(header)
        if facts["version"] != self._trt.__version__:
            return self._refuse("The engine plan file is not compatible with this version of TensorRT.")
        if self._trt.cudart.sm not in facts["sms"]:
            return self._refuse("The engine plan file is generated on an incompatible device.")
        error, weights = self._trt.cudart.cudaMalloc(len(graph))
        if int(error):
            return self._refuse("Requested amount of GPU memory could not be allocated.")
        engine = FakeEngine(self, self._trt, graph, facts["profiles"], weights)
        self._trt.engines.append(engine)
        return engine

    def _refuse(self, why: str) -> None:
        for message in (f"IRuntime::deserializeCudaEngine: {why}", "what follows from it"):
            self.logger.log(ILogger.Severity.ERROR, message)


class FakeEngine:
    def __init__(
        self, runtime: FakeRuntime, trt: FakeTensorRT, graph: bytes, profiles: Profiles, weights: int
    ) -> None:
        self.runtime = runtime  # Which has to outlive it.
        self.trt = trt
        self.profiles = profiles
        self.weights = weights
        self.config: Any = None
        self.contexts: list[FakeContext] = []
        self.in_use: WeakValueDictionary[int, FakeContext] = WeakValueDictionary()
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        inputs, outputs = self.session.get_inputs(), self.session.get_outputs()
        self.inputs = {value.name: value for value in inputs}
        self.values = {value.name: value for value in [*inputs, *outputs]}
        # A TensorScatter straight between an input and an output.
        self.aliases = {
            node.output[0]: node.input[0]
            for node in onnx.load_from_string(graph).graph.node
            if node.op_type == "TensorScatter" and node.output[0] in self.values
        }

    @property
    def num_io_tensors(self) -> int:
        return len(self.values)

    @property
    def num_optimization_profiles(self) -> int:
        return len(self.profiles)

    def get_tensor_name(self, index: int) -> str:
        return list(self.values)[index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.INPUT if name in self.inputs else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> Any:
        return Enum("DataType", [_TYPES[self.values[name].type][0]])(1)

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[list[int]]:
        return [list(shape) for shape in self.profiles[profile_index][name]]

    def get_aliased_input_tensor(self, name: str) -> str | None:
        return self.aliases.get(name)

    def create_runtime_config(self) -> Any:
        return FakeRuntimeConfig(self.trt) if self.trt.rtx else SimpleNamespace()

    def create_execution_context(self, runtime_config: Any = None) -> "FakeContext | None":
        self.config = runtime_config
        if self.trt.cudart.called("create_execution_context"):
            return None
        context = FakeContext(self)
        self.contexts.append(context)
        return context


class FakeRuntimeConfig:
    """TensorRT for RTX's; TensorRT's own has neither member."""

    def __init__(self, trt: FakeTensorRT) -> None:
        self._trt = trt
        self.cuda_graph_strategy = CudaGraphStrategy.DISABLED
        self.cache: FakeRuntimeCache | None = None

    def create_runtime_cache(self) -> "FakeRuntimeCache":
        return FakeRuntimeCache(self._trt.cudart.sm)

    def set_runtime_cache(self, cache: "FakeRuntimeCache") -> bool:
        self.cache = cache
        return True


class FakeRuntimeCache:
    def __init__(self, sm: int) -> None:
        self.tag = f"kernels of SM {sm}:".encode()
        self.kernels = b""

    def deserialize(self, blob: bytes) -> bool:
        if not blob.startswith(self.tag):
            return False
        self.kernels = blob[len(self.tag) :]
        return True

    def serialize(self) -> bytes:
        return self.tag + self.kernels


class FakeContext:
    """Shapes and addresses as they have been set, and the rules of when they may be."""

    def __init__(self, engine: FakeEngine) -> None:
        self.engine = engine
        self.active_optimization_profile = -1
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.executed: list[tuple[int, dict[str, tuple[int, ...]], dict[str, int]]] = []
        self._cudart = engine.trt.cudart
        if 0 not in engine.in_use:  # The first context begins with the first profile.
            self._take(0)

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        if not 0 <= profile_index < len(self.engine.profiles):
            return self._refuse(f"there is no profile {profile_index}")
        if self.engine.in_use.get(profile_index, self) is not self:
            raise RuleBrokenError(f"profile {profile_index} is in use by another context")
        self._cudart.enqueue(stream_handle, lambda: None)
        self._take(profile_index)
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        if name not in self.engine.inputs:
            return self._refuse(f"there is no input {name}")
        if self.active_optimization_profile < 0:
            return self._refuse("no optimization profile is selected")
        low, _, high = self.engine.profiles[self.active_optimization_profile][name]
        if len(shape) != len(low) or any(
            not least <= size <= most for least, size, most in zip(low, shape, high, strict=True)
        ):
            return self._refuse(f"{name} {list(shape)} is outside profile {self.active_optimization_profile}")
        self.shapes[name] = tuple(shape)
        return True

    def set_tensor_address(self, name: str, memory: int) -> bool:
        if name not in self.engine.values:
            return self._refuse(f"there is no tensor {name}")
        if memory % _ALIGNMENT:
            raise RuleBrokenError(f"the address of {name}, {memory:#x}, is not aligned to {_ALIGNMENT} bytes")
        self.addresses[name] = memory
        return True

    def execute_async_v3(self, stream_handle: int) -> bool:
        if self._cudart.called("execute_async_v3"):
            return self._refuse("a kernel could not be launched")
        for name in self.engine.inputs:
            if name not in self.shapes:
                return self._refuse(f"the shape of {name} has not been set for this profile")
        for name in self.engine.values:
            if name not in self.addresses:
                return self._refuse(f"{name} has no address")
        for output, source in self.engine.aliases.items():
            if self.addresses[output] != self.addresses[source]:
                raise RuleBrokenError(
                    f"{output} is not at the address of {source}, which it updates in place"
                )
        shapes, addresses = self._all_shapes(), dict(self.addresses)
        for name, shape in shapes.items():
            self._view(name, shape, addresses[name])
        self.executed.append((self.active_optimization_profile, shapes, addresses))
        self._cudart.enqueue(stream_handle, lambda: self._compute(shapes, addresses))
        return True

    def _take(self, profile: int) -> None:
        self.engine.in_use.pop(self.active_optimization_profile, None)
        self.engine.in_use[profile] = self
        self.active_optimization_profile = profile
        self.shapes.clear()  # Documented: a change of the profile invalidates all dynamic shapes.

    def _all_shapes(self) -> dict[str, tuple[int, ...]]:
        """Of inputs and outputs; rows and tokens have to be the same everywhere."""
        batch, tokens = self.shapes["input_ids"]
        if self.shapes["position_ids"] != (batch, tokens):
            raise RuleBrokenError(f"position_ids are {self.shapes['position_ids']}, not {(batch, tokens)}")
        for name, shape in self.shapes.items():
            if shape[0] != batch:
                raise RuleBrokenError(f"{name} has {shape[0]} rows, the tokens have {batch}")
        shapes = dict(self.shapes)
        for name, value in self.engine.values.items():
            if name in self.engine.aliases:
                shapes[name] = shapes[self.engine.aliases[name]]
            elif name not in shapes:  # The logits.
                shapes[name] = (batch, 1 if value.shape[1] == 1 else tokens, value.shape[2])
        return shapes

    def _view(self, name: str, shape: tuple[int, ...], address: int) -> np.ndarray:
        dtype = np.dtype(_TYPES[self.engine.values[name].type][1])
        size = int(np.prod(shape)) * dtype.itemsize
        return self._cudart.memory(address, size).view(dtype).reshape(shape)

    def _compute(self, shapes: dict[str, tuple[int, ...]], addresses: dict[str, int]) -> None:
        positions = self._view("position_ids", shapes["position_ids"], addresses["position_ids"])
        longest = max(shapes[name][2] for name in self.engine.aliases.values())
        for name in self.engine.aliases.values():
            slots = shapes[name][2]
            # A cache that is shorter than others rolls.
            ends = positions[:, 0] % slots + positions.shape[1] if slots < longest else positions[:, -1] + 1
            # TensorRT drops what it cannot write, and says nothing.
            if positions.min() < 0 or ends.max() > slots:
                raise RuleBrokenError(f"position {positions.max()} is written to {slots} slots")
        binding = self.engine.session.io_binding()
        for name, shape in shapes.items():
            view = self._view(name, shape, addresses[name])
            onnx_type = _TYPES[self.engine.values[name].type][2]
            value = ort.OrtValue.ortvalue_from_numpy_with_onnx_type(view, onnx_type)
            if name in self.engine.inputs:
                binding.bind_ortvalue_input(name, value)
            else:
                binding.bind_ortvalue_output(name, value)
        self.engine.session.run_with_iobinding(binding)

    def _refuse(self, why: str) -> bool:
        message = f"IExecutionContext: {why}."
        self.engine.runtime.logger.log(ILogger.Severity.ERROR, message)
        return False
