"""An engine and the context its steps run in, over the `tensorrt` or the `tensorrt_rtx` module.

Both modules have one API. What only TensorRT for RTX has, a runtime cache and CUDA graphs of its own, is used
where it is found.
"""

import contextlib
import importlib
import logging
import mmap
import os
import tempfile
from pathlib import Path
from typing import Any
from weakref import finalize

from gemma_export.errors import BundleError, DeviceError, MissingDependencyError
from gemma_export.runtime.cuda import CudaDevice
from gemma_export.runtime.manifest import EngineInfo

_log = logging.getLogger(__name__)

NAMES = {"rtx": "TensorRT for RTX", "tensorrt": "TensorRT"}
"""What the flavours are called."""

_MODULES = {"rtx": "tensorrt_rtx", "tensorrt": "tensorrt"}
_PACKAGES = {"rtx": "tensorrt-rtx", "tensorrt": "tensorrt"}
EXTRAS = {"rtx": "rtx", "tensorrt": "gpu"}
"""What installs their runtime: an extra of this project."""


class Engine:
    """A deserialized engine with one context, whose profile, shapes and addresses are set before it runs.

    Args:
        trt: The module.
        info: What the manifest says of it.
        path: Its file.
        device: Where it runs; a step is begun on the device's stream.
        cache: Where the kernels that TensorRT for RTX compiles on the device are kept from run to run.

    Raises:
        BundleError: TensorRT cannot load it.
        DeviceError: The device has no room for it.
    """

    def __init__(self, trt: Any, info: EngineInfo, path: Path, device: CudaDevice, cache: Path) -> None:
        self._trt = trt
        self._device = device
        self._name = NAMES[info.flavour]
        self._logger = _make_logger(trt)
        self._runtime = trt.Runtime(self._logger)
        self._engine = self._deserialize(info, path)
        config = self._configure(cache)
        self._context = self._engine.create_execution_context(*([] if config is None else [config]))
        if self._context is None:
            size = max(profile.activation_bytes for profile in info.profiles)
            raise self._cannot_load(path, size, "what a step computes")

    @property
    def tensors(self) -> dict[str, tuple[str, str]]:
        """Mode, INPUT or OUTPUT, and data type, as in HALF, of each tensor by name."""
        engine = self._engine
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        return {
            name: (engine.get_tensor_mode(name).name, engine.get_tensor_dtype(name).name) for name in names
        }

    @property
    def profiles(self) -> int:
        """How many optimization profiles it has."""
        count: int = self._engine.num_optimization_profiles
        return count

    def profile_shapes(self, name: str, profile: int) -> tuple[tuple[int, ...], ...]:
        """The smallest, the best and the largest shape of an input in a profile."""
        return tuple(tuple(shape) for shape in self._engine.get_tensor_profile_shape(name, profile))

    def aliased_input(self, output: str) -> str | None:
        """The input whose memory an output must share; None where the module does not tell."""
        if not hasattr(self._engine, "get_aliased_input_tensor"):
            return None
        name: str | None = self._engine.get_aliased_input_tensor(output)
        return name

    def select_profile(self, index: int) -> None:
        """Takes another optimization profile; all shapes have to be set again."""
        done = self._context.set_optimization_profile_async(index, self._device.stream)
        self._check(done, f"take its profile {index}")

    def set_shape(self, name: str, shape: tuple[int, ...]) -> None:
        """The shape of an input, within the profile."""
        self._check(self._context.set_input_shape(name, shape), f"take {name} as {list(shape)}")

    def set_address(self, name: str, address: int) -> None:
        """Where a tensor lies on the device."""
        self._check(self._context.set_tensor_address(name, address), f"take the address of {name}")

    def execute(self) -> None:
        """Begins a run on the device's stream."""
        self._check(self._context.execute_async_v3(self._device.stream), "run a step")

    def _deserialize(self, info: EngineInfo, path: Path) -> Any:
        # Mapped: the host holds no copy of the weights.
        try:
            with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                engine = self._runtime.deserialize_cuda_engine(content)
        except (OSError, ValueError) as error:
            raise BundleError(f"{path} cannot be read: {error}.", "Check its permissions.") from error
        if engine is None:
            raise self._cannot_load(path, info.weight_bytes, "the weights")
        return engine

    def _configure(self, path: Path) -> Any | None:
        """What the context is created with, where there is something to configure."""
        if not hasattr(self._engine, "create_runtime_config"):
            return None
        config = self._engine.create_runtime_config()
        if hasattr(config, "create_runtime_cache"):
            cache = config.create_runtime_cache()
            # One of another device or driver is refused, and replaced when this one is saved.
            with contextlib.suppress(OSError):
                if not cache.deserialize(path.read_bytes()):
                    _log.info("%s is not of this device and driver; it will be replaced", path)
            if config.set_runtime_cache(cache):
                # Kernels are compiled while steps run, so it is complete only when this is over.
                finalize(self, _save, cache, path)
        if hasattr(config, "cuda_graph_strategy"):
            config.cuda_graph_strategy = self._trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        return config

    def _cannot_load(self, path: Path, size: int, what: str) -> BundleError | DeviceError:
        """TensorRT gives no reason a program could read: what is too large is told with the numbers."""
        free, _ = self._device.free_memory()
        if free < size:
            return self._device.out_of_memory(size, what)
        return BundleError(
            f"{self._name} {self._trt.__version__} cannot load {path}: {self._logger.why()}.",
            "Run `gemma-export verify`; if it finds nothing, compile the bundle again on this device.",
        )

    def _check(self, done: bool, what: str) -> None:
        if not done:
            raise DeviceError(
                f"{self._name} could not {what} on {self._device.name}: {self._logger.why()}.",
                "If memory ran out, use a shorter prompt or a smaller batch.",
            )


def load_tensorrt(info: EngineInfo) -> Any:
    """The module that runs an engine.

    Raises:
        MissingDependencyError: It is not installed.
        BundleError: It is of another version than the engine, which runs on the one that built it only.
    """
    name, package = NAMES[info.flavour], _PACKAGES[info.flavour]
    try:
        module = importlib.import_module(_MODULES[info.flavour])
    except (ImportError, OSError) as error:
        raise MissingDependencyError(
            f"The engine {info.file} needs {name} {info.version}, which is not installed: {error}.",
            f"Run `pip install 'gemma-export[{EXTRAS[info.flavour]}]' {package}=={info.version}`.",
        ) from error
    check_version(info, module.__version__)
    return module


def check_version(info: EngineInfo, installed: str) -> None:
    """Refuses an engine of another version.

    Raises:
        BundleError: It is of one.
    """
    if installed != info.version:
        raise BundleError(
            f"The engine {info.file} was built by {NAMES[info.flavour]} {info.version} and runs on no other; "
            f"{installed} is installed.",
            f"Install {_PACKAGES[info.flavour]}=={info.version}, or compile it again with the installed one: "
            f"`gemma-export compile BUNDLE --target {info.flavour}`.",
        )


def choose_engines(engines: tuple[EngineInfo, ...], device: CudaDevice) -> tuple[EngineInfo, ...]:
    """The engines that run on a device, as their order in the manifest is.

    Raises:
        BundleError: None does.
    """
    fits = tuple(info for info in engines if device.sm in info.sms)
    if fits:
        return fits
    sms = sorted({sm for info in engines for sm in info.sms})
    raise BundleError(
        f"The bundle's engines run on SM {', '.join(map(str, sms))}; {device.name} is SM {device.sm}.",
        f"Compile one for it: `gemma-export compile BUNDLE --target rtx --sm {device.sm}`, or on the device "
        "itself with --target tensorrt, if TensorRT for RTX does not know it.",
    )


def _make_logger(trt: Any) -> Any:
    """A logger that keeps the errors, which TensorRT tells nowhere else."""
    severity = trt.ILogger.Severity

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, level: Any, message: str) -> None:
            if level in (severity.ERROR, severity.INTERNAL_ERROR):
                self.errors.append(message.strip().rstrip("."))
            _log.debug("%s: %s", level, message)

        def why(self) -> str:
            """The first error since this was asked last: those that follow it are its consequences."""
            why = self.errors[0] if self.errors else "it does not say why"
            self.errors.clear()
            return why

    return Logger()


def _save(cache: Any, path: Path) -> None:
    """Writes the runtime cache; that it cannot be kept costs time in the next run and nothing else."""
    temporary = None
    try:
        content = bytes(cache.serialize())
        path.parent.mkdir(exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            temporary = Path(file.name)
            file.write(content)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        _log.info("the runtime cache could not be written: %s", error)
        if temporary is not None:
            temporary.unlink(missing_ok=True)
