"""What a build is asked for: frozen, complete, and possible.

A combination that cannot be built is refused here, with the nearest thing that can be, before anything is
read.
"""

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, get_args

from gemma_export.errors import UsageError
from gemma_export.exporter.cache_layout import rolling_cache
from gemma_export.exporter.calibration_request import OBSERVERS, CalibrationRequest, Observer
from gemma_export.exporter.config import SIZES, GemmaConfig
from gemma_export.exporter.engines.options import EngineOptions
from gemma_export.exporter.engines.request import FLAVOURS, EngineRequest
from gemma_export.exporter.schemes import (
    PRECISIONS,
    SCHEMES,
    TARGETS,
    CacheType,
    FloatType,
    Products,
    Scheme,
    StorageType,
    scheme_for,
)
from gemma_export.runtime.kv_cache import STORAGE
from gemma_export.runtime.rolling import RollingCache

__all__ = [
    "CACHE_KINDS",
    "LOCAL_CACHES",
    "LOGITS",
    "OBSERVERS",
    "PARITY_LEVELS",
    "PRECISIONS",
    "SCHEMES",
    "TARGETS",
    "BuildRequest",
    "CacheKind",
    "CacheType",
    "CalibrationRequest",
    "EngineOptions",
    "FloatType",
    "LocalCache",
    "Observer",
    "ParityLevel",
    "Products",
    "Scheme",
    "StorageType",
    "scheme_for",
]

CacheKind = Literal["float", "int8"]
LocalCache = Literal["full", "rolling"]
ParityLevel = Literal["none", "quick", "full"]

CACHE_KINDS: tuple[CacheKind, ...] = get_args(CacheKind)
LOCAL_CACHES: tuple[LocalCache, ...] = get_args(LocalCache)
ROLLING_TARGETS = ("onnx", "rtx", "tensorrt")
"""Targets whose attention has a mask over slots; the others' counts them from the first."""
PARITY_LEVELS: tuple[ParityLevel, ...] = ("none", "quick", "full")
LOGITS = ("last", "all")


@dataclass(frozen=True)
class BuildRequest:
    """One build.

    Attributes:
        output: Folder of the bundle; None names it after the model, precision and target.
        size: One of `SIZES`; None takes the checkpoint's.
        checkpoint: Where the weights are; None takes what ships (tiny) or the local Hugging Face cache.
        random_weights: Build with seeded random weights instead.
        seed: Of the random weights.
        precision: `fp32`, `fp16`, `bf16`, `int8` or `int4`.
        target: What it is built for, a key of `SCHEMES` with the precision.
        scheme_name: How the precision is kept, where the target knows several ways; None takes the default.
        block: Columns of a weight that share a scale; None takes the scheme's default.
        calibration: What the scales are made on.
        scales: A file that `gemma-export calibrate` wrote, instead of a calibration.
        no_calibration: Take the scales from the weights alone, and read no text.
        kv_cache: Whether the cache has the scheme's format, or 8 bits.
        local_cache: Whether local layers have a slot for every position, or for their window only.
        max_kl: Keep the layers in 16 bits that a mean KL of at most this needs; None keeps none.
        max_perplexity_increase: Likewise for the perplexity, in percent.
        max_length: Slots of the cache; None takes the model's context length, at most 8192.
        logits: Whether the graph gives the logits of the last token or of all.
        parity: How much the gate measures.
        allow_parity_failure: Keep a bundle that the gate refuses, and say so in its manifest.
        tokenizer: A SentencePiece model to use instead of the one beside the weights.
        engines: How engines are built, for a target that has some.
        force: Replace an older bundle.
    """

    output: Path | None = None
    size: str | None = None
    checkpoint: Path | None = None
    random_weights: bool = False
    seed: int | None = None
    precision: str = "fp32"
    target: str = "cpu"
    scheme_name: str | None = None
    block: int | None = None
    calibration: CalibrationRequest = field(default_factory=CalibrationRequest)
    scales: Path | None = None
    no_calibration: bool = False
    kv_cache: CacheKind = "float"
    local_cache: LocalCache = "full"
    max_kl: float | None = None
    max_perplexity_increase: float | None = None
    max_length: int | None = None
    logits: Literal["last", "all"] = "last"
    parity: ParityLevel = "quick"
    allow_parity_failure: bool = False
    tokenizer: Path | None = None
    engines: EngineOptions = field(default_factory=EngineOptions)
    force: bool = False

    def __post_init__(self) -> None:
        _check_block(self.scheme, self.block)
        if self.size is not None and self.size not in SIZES:
            raise UsageError(f"There is no size {self.size!r}.", f"The sizes are {', '.join(SIZES)}.")
        if self.random_weights and self.checkpoint is not None:
            raise UsageError(
                "--random-weights and --checkpoint contradict each other.",
                "Give --checkpoint to export weights, or --random-weights to try a size without them.",
            )
        if self.random_weights and self.size is None:
            raise UsageError("--random-weights needs a size.", f"Add --size, one of {', '.join(SIZES)}.")
        if self.seed is not None and not self.random_weights:
            raise UsageError(
                "--seed is the seed of random weights, and a checkpoint has none.",
                "Leave --seed out, or add --random-weights.",
            )
        if self.seed is not None and self.seed < 0:
            raise UsageError(f"--seed {self.seed} is negative.", "Give 0 or more.")
        if self.size is None and self.checkpoint is None:
            raise UsageError(
                "Neither a size nor a checkpoint was given.",
                f"Add --size {'|'.join(SIZES)}, or --checkpoint PATH.",
            )
        if self.max_length is not None and self.max_length < 1:
            raise UsageError(
                f"--max-length {self.max_length} leaves no slot in the cache.", "Give at least 1."
            )
        if self.logits not in LOGITS:
            raise UsageError(f"--logits {self.logits} is not a choice.", "Choose last or all.")
        if self.parity not in PARITY_LEVELS:
            raise UsageError(f"--parity {self.parity} is not a choice.", "Choose none, quick or full.")
        if self.allow_parity_failure and self.parity == "none":
            raise UsageError(
                "--allow-parity-failure and --parity none contradict each other.",
                "Leave one of them out: what is not measured cannot fail.",
            )
        _check_cache(self)
        _check_local_cache(self)
        _check_calibration(self)
        _check_budgets(self)
        self.engines.check(self.target, self.precision)
        if self.max_length is not None:
            self.engines.check_chunk(self.max_length)

    @property
    def scheme(self) -> Scheme:
        """How the target keeps the precision's promise."""
        return scheme_for(self.target, self.precision, self.scheme_name)

    @property
    def cache_dtype(self) -> CacheType:
        """Format of the KV cache."""
        return "int8" if self.kv_cache == "int8" else self.scheme.cache

    def rolling_cache(self, config: GemmaConfig) -> RollingCache | None:
        """The caches of local layers, where they are to roll; None where every position has its slot.

        Raises:
            UsageError: The cache is longer than what the model was trained for, or would not be shorter.
        """
        slots = self.cache_slots(config)
        if self.local_cache == "full":
            return None
        # Without local layers there is none to roll, which is refused where there is more to say of it.
        chunk = self.engines.chunk(min(slots, config.sliding_window or slots))
        return rolling_cache(config, slots, chunk, STORAGE[self.cache_dtype].itemsize)

    @property
    def calibrated(self) -> bool:
        """Whether anything of the bundle has scales."""
        return self.scheme.products is not None

    def cache_slots(self, config: GemmaConfig) -> int:
        """Slots of the cache.

        Raises:
            UsageError: More than the model was trained for.
        """
        if self.max_length is None:
            return config.context_length
        if self.max_length > config.context_length:
            raise UsageError(
                f"--max-length {self.max_length} is more than {config.name} was trained for "
                f"({config.context_length} tokens).",
                f"Give at most {config.context_length}.",
            )
        return self.max_length

    def engine_request(self, config: GemmaConfig) -> EngineRequest | None:
        """The engines to build; None for a target that has none.

        Raises:
            UsageError: The cache or a prefill chunk is longer than what the model was trained for.
        """
        flavour = next((flavour for flavour in FLAVOURS if flavour == self.target), None)
        if flavour is None:
            return None
        rolling = self.rolling_cache(config)
        request = self.engines.request(flavour, self.cache_slots(config))
        return request if rolling is None else replace(request, prefill_chunk=rolling.chunk)

    def output_folder(self, config: GemmaConfig) -> Path:
        """Where the bundle goes."""
        return self.output or Path("bundles") / f"{config.name}-{self.precision}-{self.target}"


def _check_block(scheme: Scheme, block: int | None) -> None:
    if block is None:
        return
    blocks = () if scheme.products is None else scheme.products.blocks
    if block in blocks:
        return
    choices = [str(size) for size in blocks if size is not None]
    if not choices:
        raise UsageError(
            f"The scheme {scheme.name} has no blocks, and --block {block} was given.", "Leave --block out."
        )
    raise UsageError(
        f"Blocks of {block} columns cannot be built with the scheme {scheme.name}.",
        f"Choose one of {', '.join(choices)}.",
    )


def _check_cache(request: BuildRequest) -> None:
    if request.kv_cache not in CACHE_KINDS:
        raise UsageError(f"--kv-cache {request.kv_cache} is not a choice.", "Choose float or int8.")
    if request.kv_cache == "int8" and request.target != "cpu":
        raise UsageError(
            f"A cache of 8 bits cannot be built for the target {request.target}.",
            "Leave --kv-cache out, or take --target cpu.",
        )
    if request.kv_cache == "int8" and request.scheme.products is None:
        raise UsageError(
            f"A cache of 8 bits goes with quantized weights, and {request.precision} has none.",
            "Add --precision int8 or int4, or leave --kv-cache out.",
        )


def _check_local_cache(request: BuildRequest) -> None:
    if request.local_cache not in LOCAL_CACHES:
        raise UsageError(f"--local-cache {request.local_cache} is not a choice.", "Choose full or rolling.")
    if request.local_cache == "rolling" and request.target not in ROLLING_TARGETS:
        raise UsageError(
            f"A rolling cache cannot be built for the target {request.target}, whose attention counts slots "
            "from the first.",
            f"Leave --local-cache out, or take --target {', '.join(ROLLING_TARGETS[:-1])} or "
            f"{ROLLING_TARGETS[-1]}.",
        )


def _check_calibration(request: BuildRequest) -> None:
    """Refuses options of a calibration that would have no effect, or no sense together."""
    scheme, options = request.scheme, request.calibration.given
    instead = [("--scales", request.scales is not None), ("--no-calibration", request.no_calibration)]
    given = [*(name for name, there in instead if there), *options]
    if given and not request.calibrated:
        raise UsageError(
            f"{given[0]} is about calibration, and {request.precision} has nothing to calibrate.",
            f"Leave {given[0]} out, or add --precision int8.",
        )
    if len(given) > 1 and given[0] not in options:
        raise UsageError(
            f"{given[0]} and {given[1]} contradict each other.",
            f"Leave one of them out: with {given[0]} there is no calibration to run.",
        )
    if request.scales is not None and request.block is not None:
        raise UsageError(
            "--scales and --block contradict each other: the file has its own blocks.",
            f"Leave --block out, or run `gemma-export calibrate --block {request.block}`.",
        )
    per_tensor = scheme.products is not None and scheme.products.form == "w8a8-tensor"
    if request.no_calibration and per_tensor:
        other = next(
            other.name for other in SCHEMES[request.target, request.precision] if other is not scheme
        )
        raise UsageError(
            f"The scheme {scheme.name} needs the ranges of activations, which only a calibration finds.",
            f"Leave --no-calibration out, or take --scheme {other}.",
        )
    if request.no_calibration and request.kv_cache == "int8":
        raise UsageError(
            "A cache of 8 bits needs the ranges of keys and values, which only a calibration finds.",
            "Leave --no-calibration out, or --kv-cache.",
        )
    if "--observer" in options and not per_tensor and request.kv_cache == "float":
        raise UsageError(
            f"--observer has nothing to observe: with {scheme.name} no activations share a scale.",
            "Leave --observer out, or take --target onnx --precision int8 --scheme w8a8.",
        )


def _check_budgets(request: BuildRequest) -> None:
    budgets = {
        "--max-kl": request.max_kl,
        "--max-perplexity-increase": request.max_perplexity_increase,
    }
    for option, budget in budgets.items():
        if budget is None:
            continue
        if not 0 <= budget < math.inf:
            raise UsageError(f"{option} {budget} is no budget.", "Give a number of at least 0, as in 0.02.")
        if request.scheme.products is None:
            raise UsageError(
                f"{option} chooses layers that keep 16 bits, and with {request.precision} none is quantized.",
                f"Leave {option} out, or add --precision int8.",
            )
