"""Whether engines can be compiled on this machine: asked before anything that takes long."""

from collections.abc import Sequence
from pathlib import Path

from gemma_export.errors import EngineError
from gemma_export.exporter.engines.modules import device_sm, load_compiler
from gemma_export.exporter.engines.profiles import profiles_for, trtexec_command
from gemma_export.exporter.engines.request import EngineRequest
from gemma_export.runtime.manifest import TensorSpec


def check_compiler(request: EngineRequest, graph: Path, inputs: Sequence[TensorSpec], slots: int) -> None:
    """Refuses engines that this machine cannot compile, and says what can be done instead.

    Args:
        request: The engines.
        graph: The ONNX file, which may not be there yet.
        inputs: Its inputs.
        slots: Of a row of the cache.

    Raises:
        MissingDependencyError: What compiles them is not installed.
        EngineError: It compiles for the GPU at hand, and there is none.
    """
    command = None
    if request.flavour == "tensorrt":
        engine = graph.with_name("model.engine")
        command = trtexec_command(graph, inputs, profiles_for(request, slots), engine)
    load_compiler(request.flavour, command)
    if request.flavour == "tensorrt":
        try:
            device_sm()
        except EngineError as error:
            raise EngineError(
                error.message, f"{error.hint} TensorRT's own command does it there too: {command}"
            ) from error
