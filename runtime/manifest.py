"""What `manifest.json` says, as frozen dataclasses: the schema is the fields and their types.

`Manifest.from_json` refuses what does not have that shape and names the place; keys it does not know are
ignored, so that a later release of the same format version may add some. The exporter writes the same
dataclasses with `Manifest.to_json`.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from gemma_export.errors import BundleError
from gemma_export.runtime.kv_cache import layer_slots
from gemma_export.runtime.parity import Budget
from gemma_export.runtime.rolling import RollingCache
from gemma_export.schema import MisshapenError, read_value

FORMAT = "gemma-export-bundle"
FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
TOKENIZER_NAME = "tokenizer.model"

FloatType = Literal["float32", "float16", "bfloat16"]
StorageType = Literal["float32", "float16", "bfloat16", "int8", "int4"]
CacheType = Literal["float32", "float16", "bfloat16", "int8"]
LogitsKind = Literal["last", "all"]

_REBUILD = "Build the bundle again with `gemma-export build`, or fetch it again."


@dataclass(frozen=True)
class FileEntry:
    """A file of the bundle: its size in bytes and its SHA-256 in lower-case hexadecimal."""

    size: int
    sha256: str


@dataclass(frozen=True)
class TensorSpec:
    """An input or output of the graph; a dimension is a number or the name of a free one."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class ParameterCounts:
    """How many parameters the embedding (shared with the head) and all the rest have."""

    embedding: int
    other: int


@dataclass(frozen=True)
class ModelInfo:
    """The model's shape."""

    name: str
    size: str
    family: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_query_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    context_length: int
    rms_norm_eps: float
    rope_theta: float
    parameters: ParameterCounts


@dataclass(frozen=True)
class GraphInfo:
    """The graph's file and its contract.

    `max_length` is the number of slots of a cache row, but for the layers of a cache that rolls; `rolling` is
    None where none does.
    """

    file: str
    opset: int
    max_length: int
    logits: LogitsKind
    batch: int | str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    passes: Mapping[str, int]
    rolling: RollingCache | None = None

    @property
    def weights_file(self) -> str:
        """Where its weights lie, beside it under its name."""
        return f"{self.file}.data"

    def layer_slots(self, num_layers: int) -> list[int]:
        """Slots of a cache row in each layer."""
        return layer_slots(num_layers, self.max_length, self.rolling)


@dataclass(frozen=True)
class TokenIds:
    """Ids of the control tokens; `stop` are those that end a generation."""

    bos: int
    eos: int
    pad: int
    stop: tuple[int, ...]


@dataclass(frozen=True)
class ByteCounts:
    """Bytes of the weights, read for one decoded token, and held by one row of the cache."""

    weights: int
    per_token: int
    cache_per_row: int


@dataclass(frozen=True)
class CheckpointInfo:
    """Where the weights came from."""

    form: str
    digest: str
    source: str | None


@dataclass(frozen=True)
class CacheScales:
    """What the codes of one layer's int8 cache stand for: code · scale, a scale per KV head."""

    key: tuple[float, ...]
    value: tuple[float, ...]


@dataclass(frozen=True)
class QuantizedTensor:
    """One linear layer, or the embedding table (lookup and head), as it is stored and computed.

    Attributes:
        form: How its product is computed, a name of `graphs.formats.Form`.
        method: How its codes were chosen: `nearest`, `mse`, `gptq`, or `none` where it keeps 16 bits.
        operator: What computes it, as the optimized graph was found to.
        bits: Of a weight.
        block: Columns that share a scale; None for one scale per row, and for 16 bits.
        bytes: Of its codes and scales.
        error: Squared error of its output / squared output on the calibration text; None without one.
    """

    form: str
    method: str
    operator: str
    bits: int
    block: int | None
    bytes: int
    error: float | None


@dataclass(frozen=True)
class QuantizationInfo:
    """How the weights were quantized.

    Attributes:
        calibration: What was run for it: a file's name, `written by the model`, or None.
        tokens: How many of it.
        smoothed: How many inputs of linear layers have their channels scaled.
        kept: Why each tensor that keeps 16 bits does, by name.
        tensors: Every linear layer and the embedding table, by name.
    """

    calibration: str | None
    tokens: int
    smoothed: int
    kept: Mapping[str, str]
    tensors: Mapping[str, QuantizedTensor]


@dataclass(frozen=True)
class Range:
    """Sizes of a free dimension, both ends included, and the one that the engine is fastest at."""

    min: int
    opt: int
    max: int


@dataclass(frozen=True)
class ProfileInfo:
    """An optimization profile of an engine: the steps it runs.

    Attributes:
        name: `prefill` or `decode`; `decode-batch` for more rows than one.
        batch: Rows of a step.
        tokens: Tokens per row of a step.
        activation_bytes: Device memory it needs for a step, caches and weights aside.
    """

    name: str
    batch: Range
    tokens: Range
    activation_bytes: int


@dataclass(frozen=True)
class EngineInfo:
    """An engine that was compiled from the graph, as the audit found it.

    Attributes:
        file: Its file in the bundle.
        flavour: What built it, and runs it: TensorRT, or TensorRT for RTX.
        version: Of that; an engine runs on no other.
        sms: Compute capabilities it runs on, as in 89 for 8.9.
        profiles: Steps it runs, in the order the engine has them.
        weight_bytes: Device memory of its weights.
        kernels: How many kernels of each kind it has, over all profiles.
    """

    file: str
    flavour: Literal["rtx", "tensorrt"]
    version: str
    sms: tuple[int, ...]
    profiles: tuple[ProfileInfo, ...]
    weight_bytes: int
    kernels: Mapping[str, int]


@dataclass(frozen=True)
class ParitySummary:
    """The verdict of the parity gate; in JSON the figures stand beside it, not in an object of their own."""

    verdict: Literal["pass", "fail", "not run"]
    level: Literal["quick", "full", "none"]
    allowed_failure: bool
    figures: Mapping[str, Any]


@dataclass(frozen=True)
class Manifest:
    """All of `manifest.json`.

    `budget` is what parity judges the bundle by; None takes its precision's.
    """

    created_by: str
    model: ModelInfo
    precision: str
    scheme: str
    target: str
    storage_dtype: StorageType
    compute_dtype: FloatType
    cache_dtype: CacheType
    cache_scales: tuple[CacheScales, ...]
    quantization: QuantizationInfo | None
    fp32_tensors: tuple[str, ...]
    graph: GraphInfo
    tokens: TokenIds
    bytes: ByteCounts
    checkpoint: CheckpointInfo
    parity: ParitySummary
    tools: Mapping[str, str]
    files: Mapping[str, FileEntry]
    engines: tuple[EngineInfo, ...] = ()
    budget: Budget | None = None
    format: str = FORMAT
    format_version: int = FORMAT_VERSION

    @classmethod
    def from_json(cls, text: str) -> "Manifest":
        """Reads a manifest.

        Args:
            text: The contents of `manifest.json`.

        Raises:
            BundleError: It is not JSON, not a manifest, of another format version, or misshapen.
        """
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise BundleError(f"{MANIFEST_NAME} is not JSON: {error}.", _REBUILD) from None
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise BundleError(
                f"{MANIFEST_NAME} is not the manifest of a gemma-export bundle.",
                f'Its "format" must be "{FORMAT}"; give the folder that `gemma-export build` wrote.',
            )
        _check_version(data.get("format_version"))
        data.setdefault("engines", [])  # Bundles were written before there were any.
        data.setdefault("budget", None)
        if isinstance(data.get("graph"), dict):
            data["graph"].setdefault("rolling", None)
        parity = data.get("parity")
        if isinstance(parity, dict):
            known = {field.name for field in fields(ParitySummary)}
            figures = {key: value for key, value in parity.items() if key not in known}
            data["parity"] = {**parity, "figures": figures}
        try:
            manifest: Manifest = read_value(data, cls)
        except MisshapenError as error:
            raise BundleError(f"{MANIFEST_NAME}: {error}.", _REBUILD) from None
        _check_numbers(manifest)
        return manifest

    def to_json(self) -> str:
        """The manifest as JSON text; `from_json` reads it back to an equal value."""
        data = asdict(self)
        figures = data["parity"].pop("figures")
        data["parity"] = {**figures, **data["parity"]}
        head = {key: data.pop(key) for key in ("format", "format_version")}
        return json.dumps({**head, **data}, indent=2, ensure_ascii=False) + "\n"


def _check_version(version: object) -> None:
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise BundleError(f"{MANIFEST_NAME}: format_version is {version!r}, not a version number.", _REBUILD)
    if version > FORMAT_VERSION:
        raise BundleError(
            f"The bundle has format version {version}; this gemma-export reads up to {FORMAT_VERSION}.",
            "Upgrade gemma-export, or build the bundle again with this one.",
        )


def _check_numbers(manifest: Manifest) -> None:
    """Numbers that have the right type and can still not be true."""
    model, graph, tokens = manifest.model, manifest.graph, manifest.tokens
    sizes = {
        "model.vocab_size": model.vocab_size,
        "model.num_layers": model.num_layers,
        "model.num_kv_heads": model.num_kv_heads,
        "model.head_dim": model.head_dim,
        "graph.max_length": graph.max_length,
    }
    for place, size in sizes.items():
        if size < 1:
            raise BundleError(f"{MANIFEST_NAME}: {place} is {size}; it must be at least 1.", _REBUILD)
    _check_rolling(manifest)
    ids = [("bos", tokens.bos), ("eos", tokens.eos), ("pad", tokens.pad)]
    for name, token in [*ids, *(("stop", token) for token in tokens.stop)]:
        if token >= model.vocab_size:
            raise BundleError(
                f"{MANIFEST_NAME}: tokens.{name} {token} is outside the vocabulary of {model.vocab_size}.",
                _REBUILD,
            )


def _check_rolling(manifest: Manifest) -> None:
    """A cache that rolls must be long enough for its window, whatever is run."""
    rolling = manifest.graph.rolling
    if rolling is None:
        return
    layers = manifest.model.num_layers
    outside = [layer for layer in rolling.layers if not 0 <= layer < layers]
    needed = rolling.window + rolling.chunk - 1
    wrong = {
        f"layer {outside[:1]} is none of the {layers}": bool(outside),
        f"chunk is {rolling.chunk}; it must be at least 1": rolling.chunk < 1,
        f"window is {rolling.window}; it must be at least 1": rolling.window < 1,
        f"{rolling.slots} slots are less than the {needed} of its window and a chunk": rolling.slots < needed,
    }
    for problem, found in wrong.items():
        if found:
            raise BundleError(f"{MANIFEST_NAME}: graph.rolling: {problem}.", _REBUILD)
