"""The two TensorRTs, imported where they are needed: one API under two names."""

import importlib
from typing import Any

from gemma_export.errors import DeviceError, EngineError, MissingDependencyError
from gemma_export.exporter.engines.request import EngineRequest, Flavour, plans_of
from gemma_export.runtime.cuda import CudaDevice, load_cudart
from gemma_export.runtime.tensorrt_engine import EXTRAS, NAMES

MODULES: dict[Flavour, str] = {"rtx": "tensorrt_rtx", "tensorrt": "tensorrt"}
CACHE_UPDATES = "10.15"
"""The first TensorRT that updates a cache in place."""


def load_compiler(flavour: Flavour, command: str | None = None) -> Any:
    """The module that compiles.

    Args:
        flavour: Which.
        command: What does the same on the device without this project, where that is known.

    Raises:
        MissingDependencyError: It is not installed, or too old.
    """
    name = NAMES[flavour]
    try:
        trt = importlib.import_module(MODULES[flavour])
    except (ImportError, OSError) as error:
        # A package may be there without the libraries it wraps.
        why = "" if isinstance(error, ModuleNotFoundError) else f": {error}"
        raise MissingDependencyError(
            f"{name} is not installed{why}.", _installation(flavour, command)
        ) from error
    if not hasattr(trt, "IKVCacheUpdateLayer") or not hasattr(trt, "IStreamWriter"):
        raise MissingDependencyError(
            f"{name} {trt.__version__} is installed, which cannot update a cache in place.",
            _installation(flavour, command),
        )
    return trt


def device_sm() -> int:
    """Compute capability of the GPU at hand, as in 89 for 8.9: TensorRT compiles for that one.

    Raises:
        EngineError: There is none.
        MissingDependencyError: cuda-bindings are not installed.
    """
    try:
        return CudaDevice(load_cudart(EXTRAS["tensorrt"])).sm
    except DeviceError as error:
        raise EngineError(
            f"TensorRT compiles for the GPU of the machine it runs on, and there is none: {error.message}",
            "Take --target rtx, which needs no GPU; or --target onnx here, and `gemma-export compile BUNDLE "
            "--target tensorrt` on the device.",
        ) from error


def plans_for(request: EngineRequest) -> tuple[tuple[int, ...], ...]:
    """The compute capabilities of each plan that a request asks for.

    Raises:
        EngineError: The plan is for the GPU at hand, and there is none.
        MissingDependencyError: Likewise, and cuda-bindings are not installed.
    """
    return plans_of(request) if request.flavour == "rtx" else ((device_sm(),),)


def _installation(flavour: Flavour, command: str | None) -> str:
    if flavour == "rtx":
        return "Install it: pip install 'gemma-export[rtx]'. It needs no GPU."
    by_hand = "" if command is None else f", or there: {command}"
    return (
        f"It comes with JetPack, or from NVIDIA ({CACHE_UPDATES} or later): pip install 'gemma-export[gpu]'. "
        "Where it cannot be had take --target rtx, which needs no GPU; or --target onnx here, and on the "
        f"device `gemma-export compile BUNDLE --target tensorrt`{by_hand}"
    )
