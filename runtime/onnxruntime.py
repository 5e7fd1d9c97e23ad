"""The onnxruntime backend, on a CPU: nothing is allocated or copied per decoded token.

Past and present of a layer are bound to one buffer, so the graph writes the new slots in place. The
inputs and the logits of a step have buffers of their own, bound once per cache and shape.
"""

import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from gemma_export.errors import BundleError, GemmaExportError, MissingDependencyError, UsageError
from gemma_export.runtime.backend import INPUT_IDS, LOGITS, POSITION_IDS, Ids, Logits, cache_names
from gemma_export.runtime.bundle import Bundle
from gemma_export.runtime.kv_cache import Array, KVCache
from gemma_export.runtime.manifest import LogitsKind, Manifest

try:
    import onnxruntime as ort
except ImportError as error:
    raise MissingDependencyError(
        "Running a bundle needs onnxruntime, which is not installed.",
        "Install it with `pip install 'gemma-export[cpu]'`.",
    ) from error

# TensorProto.DataType of the ONNX specification.
_ELEMENT_TYPE = {"float32": 1, "int8": 3, "int64": 7, "float16": 10, "bfloat16": 16}
# onnxruntime's own spelling of the same.
_ORT_TYPE = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(bfloat16)": "bfloat16",
    "tensor(int8)": "int8",
}

# Where a graph that is not a file finds its weights.
_WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"

# Without an instruction that sums products of 8 bits in 32, x86 sums pairs of them in 16, which saturates.
_NO_SATURATION = "session.x64quantprecision"
_VNNI = ("avx512_vnni", "avx_vnni")

# What onnxruntime evaluates at load, a weight's conversion to fp32 for one, it holds in memory whole.
_KEEPING_WEIGHTS_AS_STORED = ["ConstantFolding"]

_FATAL = 4  # onnxruntime's log level: what it logs as an error it also raises, and we tell it once


class OnnxRuntimeBackend:
    """A `Backend` over onnxruntime's CPU provider.

    Args:
        bundle: A bundle that has been checked.
        threads: Threads within an operator; None lets onnxruntime take one per physical core.
        graph: A serialized graph to run in place of the bundle's, over the same weights; the manifest must
            describe it. Its weights stay as they are stored and are converted when they are used.

    Raises:
        BundleError: onnxruntime cannot load the graph, or the graph has another contract.
        UsageError: `threads` is below 1.
    """

    def __init__(self, bundle: Bundle, threads: int | None = None, *, graph: bytes | None = None) -> None:
        if threads is not None and threads < 1:
            raise UsageError(f"threads is {threads}.", "Give at least 1, or leave it out.")
        self._manifest = bundle.manifest
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads or 0
        options.inter_op_num_threads = 1
        options.log_severity_level = _FATAL
        if graph is not None:
            # Weights are converted where the graph does so, not as early as can be, and then given back.
            options.execution_order = ort.ExecutionOrder.PRIORITY_BASED
            options.enable_cpu_mem_arena = False
        path = bundle.file(bundle.manifest.graph.file)
        if not has_integer_dot_product():
            options.add_session_config_entry(_NO_SATURATION, "1")
        options.add_session_config_entry(_WEIGHTS_FOLDER, str(bundle.path))
        try:
            self._session = ort.InferenceSession(
                graph or str(path),
                options,
                providers=["CPUExecutionProvider"],
                disabled_optimizers=[] if graph is None else _KEEPING_WEIGHTS_AS_STORED,
            )
        except Exception as error:
            # onnxruntime's exceptions share no base of their own.
            raise BundleError(
                f"onnxruntime {ort.__version__} cannot load {path}: {_first_line(error)}",
                _hint(bundle.manifest),
            ) from error
        _check_contract(self._session, bundle.manifest)
        self._bound: WeakKeyDictionary[KVCache, _Binding] = WeakKeyDictionary()

    @property
    def logits(self) -> LogitsKind:
        """As `Backend.logits`."""
        return self._manifest.graph.logits

    def new_cache(self, batch: int) -> KVCache:
        """As `Backend.new_cache`; the memory is the host's."""
        model = self._manifest.model
        return KVCache.allocate(
            layers=model.num_layers,
            batch=batch,
            kv_heads=model.num_kv_heads,
            max_length=self._manifest.graph.max_length,
            head_dim=model.head_dim,
            dtype=self._manifest.cache_dtype,
            scales=self._manifest.cache_scales,
        )

    def run(self, input_ids: Ids, position_ids: Ids, cache: KVCache) -> Logits:
        """As `Backend.run`."""
        binding = self._bound.get(cache)
        if binding is None:
            binding = self._bound[cache] = _Binding(self._session, self._manifest, cache)
        return binding.run(input_ids, position_ids)


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


class _Binding:
    """A cache bound to the graph, with the buffers of its steps; holds the cache's memory, not the cache."""

    def __init__(self, session: Any, manifest: Manifest, cache: KVCache) -> None:
        self._session = session
        self._batch = cache.batch
        self._vocabulary = manifest.model.vocab_size
        self._all_logits = manifest.graph.logits == "all"
        self._binding = session.io_binding()
        # numpy memory that onnxruntime points into has to outlive the binding.
        self._memory: list[Array] = [*cache.key_buffers, *cache.value_buffers]
        names = cache_names(manifest.model.num_layers)
        for layer, (past_key, past_value, key, value) in enumerate(names):
            self._bind_cache(past_key, key, cache.key_buffers[layer], cache.dtype)
            self._bind_cache(past_value, value, cache.value_buffers[layer], cache.dtype)
        self._logits: Logits = np.empty((0, 0, 0), np.float32)
        self._bind_step(1)

    def run(self, input_ids: Ids, position_ids: Ids) -> Logits:
        if input_ids.shape != self._input_ids.shape:
            self._bind_step(input_ids.shape[1])
        self._input_ids[...] = input_ids
        self._position_ids[...] = position_ids
        try:
            self._session.run_with_iobinding(self._binding)
        except Exception as error:
            raise GemmaExportError(
                f"onnxruntime could not run tokens {list(input_ids.shape)}: {_first_line(error)}",
                "If memory ran out, use a shorter prompt, a smaller prefill chunk or a smaller batch.",
            ) from error
        return self._logits

    def _bind_cache(self, past: str, present: str, buffer: Array, dtype: str) -> None:
        value = _ort_value(buffer, dtype)
        self._binding.bind_ortvalue_input(past, value)
        self._binding.bind_ortvalue_output(present, value)

    def _bind_step(self, tokens: int) -> None:
        """Buffers for steps of `tokens` tokens per row; decoding sets them up once."""
        self._input_ids: Ids = np.zeros((self._batch, tokens), np.int64)
        self._position_ids: Ids = np.zeros((self._batch, tokens), np.int64)
        self._binding.bind_ortvalue_input(INPUT_IDS, _ort_value(self._input_ids, "int64"))
        self._binding.bind_ortvalue_input(POSITION_IDS, _ort_value(self._position_ids, "int64"))
        shape = (self._batch, tokens if self._all_logits else 1, self._vocabulary)
        if self._logits.shape != shape:
            self._logits = np.zeros(shape, np.float32)
            self._binding.bind_ortvalue_output(LOGITS, _ort_value(self._logits, "float32"))


def _ort_value(array: Array, dtype: str) -> Any:
    """An OrtValue over the array's own memory; bfloat16 arrives as uint16."""
    return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array, _ELEMENT_TYPE[dtype])


def _check_contract(session: Any, manifest: Manifest) -> None:
    """Refuses a graph whose inputs, outputs or caches are not those its manifest promises."""
    names = list(cache_names(manifest.model.num_layers))
    wanted_inputs = {INPUT_IDS, POSITION_IDS, *(name for past in names for name in past[:2])}
    wanted_outputs = {LOGITS, *(name for present in names for name in present[2:])}
    inputs = {value.name: value for value in session.get_inputs()}
    outputs = {value.name: value for value in session.get_outputs()}
    _check_names("inputs", wanted_inputs, inputs)
    _check_names("outputs", wanted_outputs, outputs)
    model, graph = manifest.model, manifest.graph
    _check_scales(manifest)
    caches = {name for layer in names for name in layer}
    for value in (*inputs.values(), *outputs.values()):
        if value.name in caches:
            dtype, shape = manifest.cache_dtype, [None, model.num_kv_heads, graph.max_length, model.head_dim]
            _check_tensor(value, dtype, shape)
    logits = outputs[LOGITS]
    _check_tensor(logits, "float32", [None, None, model.vocab_size])
    # The last token's logits are declared as 1, those of all tokens as a free dimension.
    tokens = logits.shape[1]
    if (tokens == 1) != (graph.logits == "last"):
        raise _other_contract(f"it gives the logits of {tokens} tokens, the manifest says {graph.logits}")


def _check_scales(manifest: Manifest) -> None:
    """Refuses an int8 cache whose codes nobody could read, and scales of a cache that has no codes."""
    model = manifest.model
    heads = [(len(layer.key), len(layer.value)) for layer in manifest.cache_scales]
    if manifest.cache_dtype != "int8" and heads:
        raise _other_contract(f"the manifest has scales of a cache that is {manifest.cache_dtype}")
    if manifest.cache_dtype == "int8" and heads != [(model.num_kv_heads,) * 2] * model.num_layers:
        raise _other_contract(
            f"its int8 cache has {model.num_layers} layers of {model.num_kv_heads} KV heads, "
            f"the manifest has the scales of {heads or 'none'}"
        )


def _check_tensor(value: Any, dtype: str, shape: Sequence[int | None]) -> None:
    """`shape` is as the graph must have it; None is any dimension."""
    fits = len(value.shape) == len(shape) and all(
        wanted is None or found == wanted for found, wanted in zip(value.shape, shape, strict=True)
    )
    if _ORT_TYPE.get(value.type) != dtype or not fits:
        promised = ["any" if size is None else size for size in shape]
        raise _other_contract(
            f"{value.name} is {value.type} {value.shape}, the manifest says {dtype} {promised}"
        )


def _check_names(what: str, wanted: set[str], found: Sequence[str] | dict[str, Any]) -> None:
    missing, unknown = wanted - set(found), set(found) - wanted
    if missing or unknown:
        raise _other_contract(
            f"its {what} "
            + " and ".join(
                f"{verb} {', '.join(sorted(names)[:4])}"
                for verb, names in (("lack", missing), ("have the unknown", unknown))
                if names
            )
        )


def _other_contract(why: str) -> BundleError:
    return BundleError(
        f"The graph is not the one its manifest describes: {why}.",
        "Build the bundle again, or fetch it again.",
    )


def _first_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0]
