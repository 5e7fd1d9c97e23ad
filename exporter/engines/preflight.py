"""Whether engines can be compiled on this machine: asked before anything that takes long."""

from gemma_export.errors import EngineError
from gemma_export.exporter.engines.modules import device_sm, load_compiler
from gemma_export.exporter.engines.request import EngineRequest


def check_compiler(request: EngineRequest, command: str | None = None) -> None:
    """Refuses engines that this machine cannot compile, and says what can be done instead.

    Args:
        request: The engines.
        command: What does the same on the device without this project; None where there is no graph yet.

    Raises:
        MissingDependencyError: What compiles them is not installed.
        EngineError: It compiles for the GPU at hand, and there is none.
    """
    load_compiler(request.flavour, command)
    if request.flavour == "tensorrt":
        try:
            device_sm()
        except EngineError as error:
            if command is None:
                raise
            raise EngineError(
                error.message, f"{error.hint} TensorRT's own command does it there too: {command}"
            ) from error
