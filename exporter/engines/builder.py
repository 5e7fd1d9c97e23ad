"""ONNX → plan: TensorRT parses a graph, compiles it and streams the result to a file.

TensorRT calls back into Python from C++, which swallows what a callback raises. Callbacks here raise nothing:
they keep what went wrong, have the build canceled, and it is raised when TensorRT has returned.
"""

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any

from gemma_export.errors import EngineError
from gemma_export.exporter.engines.engine_graph import EngineGraph
from gemma_export.exporter.engines.network import NetworkFacts, read_network
from gemma_export.exporter.engines.profiles import Profile

Progress = Callable[[int, int], None]
"""Called with percent done and 100."""

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True)
class Plan:
    """A plan that was written.

    Attributes:
        size: Its bytes.
        log: What TensorRT said while it compiled.
    """

    size: int
    log: tuple[str, ...]


def compile_plan(
    trt: Any,
    source: EngineGraph,
    profiles: Sequence[Profile],
    sms: Sequence[int],
    output: Path,
    *,
    check: Callable[[NetworkFacts], None],
    progress: Progress,
) -> Plan:
    """Compiles a graph; nothing is left of the output unless all of it was written.

    Args:
        trt: `tensorrt_rtx` or `tensorrt`.
        source: The graph.
        profiles: Steps the engine runs.
        sms: Compute capabilities to compile for; none for the GPU at hand.
        output: The plan's file.
        check: Called with what the parser made of the graph, before the long part; raises to refuse it.
        progress: Called from one of TensorRT's threads.

    Raises:
        EngineError: TensorRT does not take the graph, or cannot compile it.
        OSError: The disk refuses.
        KeyboardInterrupt: The build was canceled with Ctrl-C.
    """
    log = _logger(trt)
    partial = output.with_name(f".{output.name}.partial")
    try:
        with log.recorded() as messages, _signals_kept() as interrupted:
            size = _compile(trt, log, source, profiles, sms, partial, check, progress, interrupted)
        partial.replace(output)
    finally:
        partial.unlink(missing_ok=True)
    return Plan(size, tuple(messages))


def _compile(
    trt: Any,
    log: Any,
    source: EngineGraph,
    profiles: Sequence[Profile],
    sms: Sequence[int],
    partial: Path,
    check: Callable[[NetworkFacts], None],
    progress: Progress,
    interrupted: Callable[[], bool],
) -> int:
    """Writes the plan and returns its bytes; TensorRT's objects are gone when it ends."""
    try:
        builder = trt.Builder(log)
    except TypeError as error:  # What a constructor raises that TensorRT answered with a null pointer.
        raise EngineError(f"TensorRT does not start here: {log.why()}.", "Look at `nvidia-smi`.") from error
    network = builder.create_network(_strongly_typed(trt))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(source.file)):
        reasons = "; ".join(_reason(parser.get_error(index)) for index in range(parser.num_errors))
        raise EngineError(
            f"TensorRT {trt.__version__} does not take {source.file.name}: {reasons or log.why()}.",
            "Build the bundle again, with this release of gemma-export.",
        )
    check(read_network(trt, network))
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if sms:
        config.num_compute_capabilities = len(sms)
        for index, sm in enumerate(sms):
            config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{sm}"), index)
    for profile in profiles:
        shapes = builder.create_optimization_profile()
        for spec in source.inputs:
            shapes.set_shape(spec.name, *profile.shapes(spec.shape))
        config.add_optimization_profile(shapes)
    with partial.open("wb", buffering=0) as file:
        writer = _stream_writer(trt)(file)
        monitor = _monitor(trt)(progress, lambda: interrupted() or writer.error is not None)
        config.progress_monitor = monitor
        done = builder.build_serialized_network_to_stream(network, config, writer)
    if writer.error is not None:
        raise writer.error
    if monitor.error is not None:
        raise monitor.error
    if interrupted():
        return 0  # Whoever holds the signals raises.
    if not done:
        targets = f" for SM {', '.join(map(str, sms))}" if sms else ""
        raise EngineError(
            f"TensorRT {trt.__version__} cannot compile {source.file.name}{targets}: {log.why()}.",
            "If memory ran out, free some; otherwise another --precision may compile.",
        )
    progress(100, 100)  # Of its last phases TensorRT tells nothing.
    return int(writer.written)


def _reason(error: Any) -> str:
    """What the parser says, and of which node."""
    node = f" ({error.node_operator()} {error.node_name()})" if error.node_name() else ""
    return str(error.desc()).strip().rstrip(".") + node


def _strongly_typed(trt: Any) -> int:
    """The flag that makes the graph's types those of the engine; where all networks are so, there is none."""
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


@contextmanager
def _signals_kept() -> Iterator[Callable[[], bool]]:
    """Keeps signals until the body has ended, and says whether one came; then it takes its usual course.

    A handler that raises would do so in a callback, where C++ swallows it.
    """
    kept: list[int] = []

    def keep(number: int, frame: FrameType | None) -> None:
        kept.append(number)

    handlers: dict[signal.Signals, Any] = {}
    if threading.current_thread() is threading.main_thread():
        handlers = {number: signal.getsignal(number) for number in _SIGNALS}
        for number, handler in handlers.items():
            if handler not in (signal.SIG_IGN, None):
                signal.signal(number, keep)
    try:
        yield lambda: bool(kept)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for first in kept[:1]:
            signal.raise_signal(first)


@cache
def _logger(trt: Any) -> Any:
    """The one logger of the process: TensorRT takes no second while an object with the first is alive."""
    severity = trt.ILogger.Severity
    errors = (severity.ERROR, severity.INTERNAL_ERROR)

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.messages: list[str] = []
            self._errors: list[str] = []

        def log(self, level: Any, message: str) -> None:
            self.messages.append(message)
            if level in errors:
                self._errors.append(message.strip().rstrip("."))

        @contextmanager
        def recorded(self) -> Iterator[list[str]]:
            """What is said while the body runs."""
            self.messages, self._errors = [], []
            try:
                yield self.messages
            finally:
                self.messages = []

        def why(self) -> str:
            """The first error: those that follow it are its consequences."""
            return self._errors[0] if self._errors else "it does not say why"

    return Logger()


@cache
def _stream_writer(trt: Any) -> Any:
    class Writer(trt.IStreamWriter):  # type: ignore[misc]
        """Appends to a file; once that failed, nothing more is written."""

        def __init__(self, file: Any) -> None:
            trt.IStreamWriter.__init__(self)
            self._file = file
            self.written = 0
            self.error: OSError | None = None

        def write(self, data: bytes) -> int:
            if self.error is not None:
                return 0
            try:
                view = memoryview(data)
                while view:
                    count = self._file.write(view)
                    self.written += count
                    view = view[count:]
            except OSError as error:
                self.error = error
                return 0
            return len(data)

    return Writer


@cache
def _monitor(trt: Any) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        """Turns nested phases into percent of the whole, and asks after each step whether to go on."""

        def __init__(self, progress: Progress, stop: Callable[[], bool]) -> None:
            trt.IProgressMonitor.__init__(self)
            self._progress, self._stop = progress, stop
            self._lock = threading.Lock()
            self._steps: dict[str, int] = {}
            self._done: dict[str, int] = {}
            self._parents: dict[str, str | None] = {}
            self._told = -1
            self.error: Exception | None = None

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            with self._lock:
                self._parents[name], self._steps[name], self._done[name] = parent, max(steps, 1), 0

        def phase_finish(self, name: str) -> None:
            with self._lock:
                self._done[name] = self._steps.get(name, 1)

        def step_complete(self, name: str, step: int) -> bool:
            try:
                with self._lock:
                    self._done[name] = step + 1
                    percent = min(int(100 * self._fraction(name)), 100)
                    news, self._told = percent > self._told, max(percent, self._told)
                if news:
                    self._progress(percent, 100)
            except Exception as error:  # Of whoever listens.
                self.error = error
            return self.error is None and not self._stop()

        def _fraction(self, name: str) -> float:
            """How much is done of the whole, seen from a phase."""
            fraction = self._done[name] / self._steps[name]
            parent = self._parents.get(name)
            while parent in self._steps:
                fraction = (self._done[parent] + min(fraction, 1.0)) / self._steps[parent]
                parent = self._parents.get(parent)
            return fraction

    return Monitor
