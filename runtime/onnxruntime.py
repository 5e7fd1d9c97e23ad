"""The onnxruntime backend, on a CPU: nothing is allocated or copied per decoded token."""

import platform
from pathlib import Path
from typing import Any

from gemma_export.errors import BundleError, UsageError, first_line
from gemma_export.runtime.bundle import Bundle
from gemma_export.runtime.kv_cache import KVCache
from gemma_export.runtime.large_pages import bring_in
from gemma_export.runtime.manifest import Manifest
from gemma_export.runtime.native import ATTENTION, library
from gemma_export.runtime.onnxruntime_graph import FATAL, LoadedGraph, ort

# Where a graph that is not a file finds its weights.
_WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"

# Without an instruction that sums products of 8 bits in 32, x86 sums pairs of them in 16, which saturates.
_NO_SATURATION = "session.x64quantprecision"
_VNNI = ("avx512_vnni", "avx_vnni")


class OnnxRuntimeBackend(LoadedGraph):
    """A `Backend` over onnxruntime's CPU provider.

    Args:
        bundle: A bundle that has been checked.
        threads: Threads within an operator; None lets onnxruntime take one per physical core.
        graph: A serialized graph to run in place of the bundle's, over the same weights; the manifest must
            describe it. It is run as it is written, operator by operator.
        profile: Where to write what each operator took, as the beginning of a file's name; onnxruntime
            writes it when `session.end_profiling` is called, and says the whole name. None writes nothing.

    Raises:
        BundleError: onnxruntime cannot load the graph, or the graph has another contract.
        UsageError: `threads` is below 1.
    """

    def __init__(
        self,
        bundle: Bundle,
        threads: int | None = None,
        *,
        graph: bytes | None = None,
        profile: Path | None = None,
    ) -> None:
        if threads is not None and threads < 1:
            raise UsageError(f"threads is {threads}.", "Give at least 1, or leave it out.")
        path = bundle.file(bundle.manifest.graph.file)

        def open_session(kernels: Path | None) -> Any:
            options = _options(bundle, threads, profile)
            if graph is not None:
                # As it is written: weights are mapped, and converted where the graph does so, not at load nor
                # as early as can be; the memory is given back at once.
                options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
                options.execution_order = ort.ExecutionOrder.PRIORITY_BASED
                options.enable_cpu_mem_arena = False
            if kernels is not None:
                if bundle.manifest.cache_dtype == "float32":
                    options.add_session_config_entry(ATTENTION, "1")
                options.register_custom_ops_library(str(kernels))
            return ort.InferenceSession(graph or str(path), options, providers=["CPUExecutionProvider"])

        kernels = library() if graph is None and bundle.manifest.target == "cpu" else None
        if kernels is not None and (weights := bundle.manifest.graph.weights_file) in bundle.manifest.files:
            bring_in(bundle.file(weights))  # Ours read the weights where they are mapped.
        try:
            try:
                session = open_session(kernels)
            except Exception:
                if kernels is None:
                    raise
                # What our kernels do not know, such as a graph that was changed, onnxruntime's may.
                session = open_session(None)
        except Exception as error:
            # onnxruntime's exceptions share no base of their own.
            raise BundleError(
                f"onnxruntime {ort.__version__} cannot load {path}: {first_line(error)}",
                _hint(bundle.manifest),
            ) from error
        super().__init__(session, bundle.manifest, "cpu")

    def new_cache(self, batch: int) -> KVCache:
        """As `Backend.new_cache`; the memory is the host's."""
        model = self.manifest.model
        return KVCache.allocate(
            layers=model.num_layers,
            batch=batch,
            kv_heads=model.num_kv_heads,
            max_length=self.manifest.graph.max_length,
            head_dim=model.head_dim,
            dtype=self.manifest.cache_dtype,
            scales=self.manifest.cache_scales,
            rolling=self.manifest.graph.rolling,
        )


def _options(bundle: Bundle, threads: int | None, profile: Path | None) -> Any:
    """What every session over a bundle's weights has."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or 0
    options.inter_op_num_threads = 1
    options.log_severity_level = FATAL
    # Its memory for a whole run would come on top of what the first run took in parts.
    options.enable_mem_pattern = False
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    if not has_integer_dot_product():
        options.add_session_config_entry(_NO_SATURATION, "1")
    options.add_session_config_entry(_WEIGHTS_FOLDER, str(bundle.path))
    return options


def has_integer_dot_product(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether products of 8-bit integers are summed exactly; on anything but an x86 they are."""
    try:
        text = cpuinfo.read_text()
    except OSError:  # No Linux, so nothing is known: the exact way is right everywhere.
        return platform.machine().lower() not in ("x86_64", "amd64")
    flags = next((line for line in text.splitlines() if line.startswith("flags")), None)
    return flags is None or any(name in flags.split() for name in _VNNI)


def _hint(manifest: Manifest) -> str:
    if manifest.compute_dtype == "bfloat16":
        return (
            "A CPU has no bfloat16 arithmetic; this graph is for a device that has. To run it here, build it "
            "with --target cpu."
        )
    return "Install onnxruntime 1.30 or later; if it is, build the bundle again."
