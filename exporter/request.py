"""What a build is asked for: frozen, complete, and possible.

A combination that cannot be built is refused here, with the nearest thing that can be, before anything is
read.
"""

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal, get_args

from gemma_export.calibration.text import FEWEST_TOKENS
from gemma_export.errors import UsageError
from gemma_export.exporter.config import SIZES, GemmaConfig
from gemma_export.graphs.formats import Form

FloatType = Literal["float32", "float16", "bfloat16"]
StorageType = Literal["float32", "float16", "bfloat16", "int8", "int4"]
CacheType = Literal["float32", "float16", "bfloat16", "int8"]
CacheKind = Literal["float", "int8"]
Observer = Literal["absmax", "percentile", "entropy", "mse"]
ParityLevel = Literal["none", "quick", "full"]

OBSERVERS: tuple[Observer, ...] = get_args(Observer)
CACHE_KINDS: tuple[CacheKind, ...] = get_args(CacheKind)
PARITY_LEVELS: tuple[ParityLevel, ...] = ("none", "quick", "full")
LOGITS = ("last", "all")


@dataclass(frozen=True)
class Products:
    """How a quantized scheme computes its products.

    Attributes:
        form: The form of every linear layer that can take it.
        bits: Of a weight.
        blocks: Columns that may share a scale, the default first; (None,) for a scale per row.
        table_block: Columns that share a scale in the embedding table, which always has 8 bits.
        otherwise: The form of a layer whose activations lose too much when they are rounded.
        otherwise_block: Columns that share a scale there.
    """

    form: Form
    bits: Literal[4, 8]
    blocks: tuple[int | None, ...]
    table_block: int | None
    otherwise: Form | None = None
    otherwise_block: int | None = None


@dataclass(frozen=True)
class Scheme:
    """How a target keeps the promise that a precision makes.

    Attributes:
        name: As the manifest calls it.
        storage: Format of the weights on disk.
        compute: Format of the arithmetic, fp32 islands and integer products aside.
        cache: Format of the KV cache.
        products: How weights and products are quantized; None where they are not.
    """

    name: str
    storage: StorageType
    compute: FloatType
    cache: CacheType
    products: Products | None = None

    @property
    def floating_storage(self) -> FloatType:
        """Format of the weights that are not quantized."""
        return "float16" if self.storage == "int8" or self.storage == "int4" else self.storage


# What TensorRT compiles. It takes 8 bits with a scale per row; blocks are for 4 bits.
_FP16 = Scheme("fp16", "float16", "float16", "float16")
_BF16 = Scheme("bf16", "bfloat16", "bfloat16", "bfloat16")
_W8A16 = Scheme("w8a16", "int8", "float16", "float16", Products("w8", 8, (None,), None))
_W8A8 = Scheme(
    "w8a8", "int8", "float16", "float16", Products("w8a8-tensor", 8, (None,), None, otherwise="w8")
)
_W4A16 = Scheme("w4a16", "int4", "float16", "float16", Products("w4", 4, (128, 64, 32), None))

SCHEMES: dict[tuple[str, str], tuple[Scheme, ...]] = {
    ("cpu", "fp32"): (Scheme("fp32", "float32", "float32", "float32"),),
    # onnxruntime's CPU provider has no 16-bit products on x86: it would convert back and forth around each.
    ("cpu", "fp16"): (Scheme("fp16-storage", "float16", "float32", "float32"),),
    ("cpu", "bf16"): (Scheme("bf16-storage", "bfloat16", "float32", "float32"),),
    # 256 columns is the largest block of onnxruntime's MatMulNBits: scales of a 64th of the codes.
    ("cpu", "int8"): (
        Scheme(
            "w8a8-dynamic",
            "int8",
            "float32",
            "float32",
            Products("w8a8-token", 8, (None,), 256, otherwise="w8", otherwise_block=256),
        ),
        Scheme("w8a16", "int8", "float32", "float32", Products("w8", 8, (128, 32, 64, 256), 256)),
    ),
    ("cpu", "int4"): (Scheme("w4a16", "int4", "float32", "float32", Products("w4", 4, (128, 32, 64), 256)),),
    ("onnx", "fp32"): (Scheme("fp32", "float32", "float32", "float32"),),
    ("onnx", "fp16"): (_FP16,),
    ("onnx", "bf16"): (_BF16,),
    ("onnx", "int8"): (_W8A16, _W8A8),
    ("onnx", "int4"): (_W4A16,),
    # Its documentation lists no GPU for products of integers; they build, and have to be asked for.
    ("rtx", "fp16"): (_FP16,),
    ("rtx", "bf16"): (_BF16,),
    ("rtx", "int8"): (_W8A16, _W8A8),
    ("rtx", "int4"): (_W4A16,),
    ("tensorrt", "fp16"): (_FP16,),
    ("tensorrt", "bf16"): (_BF16,),
    ("tensorrt", "int8"): (_W8A8, _W8A16),
    ("tensorrt", "int4"): (_W4A16,),
}
"""Everything that can be built, by target and precision; of several schemes, the default first."""

TARGETS = tuple(dict.fromkeys(target for target, _ in SCHEMES))
PRECISIONS = tuple(dict.fromkeys(precision for _, precision in SCHEMES))


def scheme_for(target: str, precision: str, name: str | None = None) -> Scheme:
    """The scheme of a target and a precision.

    Args:
        target: A key of `SCHEMES`.
        precision: Likewise.
        name: Which, where there are several; None takes the default.

    Raises:
        UsageError: There is none; the hint names what there is.
    """
    if target not in TARGETS:
        raise UsageError(
            f"There is no target {target!r}.",
            f"The targets are {' and '.join(TARGETS)}; --target onnx is the graph that other runtimes take.",
        )
    schemes = SCHEMES.get((target, precision))
    if schemes is None:
        possible = [p for t, p in SCHEMES if t == target]
        raise UsageError(
            f"The precision {precision!r} cannot be built for the target {target}.",
            f"Choose one of {', '.join(possible)}; --precision {possible[-1]} is the smallest.",
        )
    if name is None:
        return schemes[0]
    for scheme in schemes:
        if scheme.name == name:
            return scheme
    elsewhere = [
        f"--target {t} --precision {p}" for (t, p), s in SCHEMES.items() if name in {x.name for x in s}
    ]
    hint = f"Choose {' or '.join(scheme.name for scheme in schemes)}, or leave --scheme out"
    raise UsageError(
        f"There is no scheme {name!r} of {precision} for the target {target}.",
        f"{hint}{f'; {name} can be had with {elsewhere[0]}' if elsewhere else ''}.",
    )


@dataclass(frozen=True)
class CalibrationRequest:
    """What a calibration runs on.

    Attributes:
        data: A file with text; None lets the model write its own.
        samples: The most sequences; None takes as many as do: 128 of a file, 32 of the model's own.
        length: The most tokens of each; None takes 512 of a file, 64 of the model's own.
        seed: Of what is chosen from the file, or of what the model writes; None takes 0.
        observer: What sets the scale of activations that share one.
    """

    data: Path | None = None
    samples: int | None = None
    length: int | None = None
    seed: int | None = None
    observer: Observer = "mse"

    def __post_init__(self) -> None:
        if self.samples is not None and self.samples < 1:
            raise UsageError(
                f"--calibration-samples {self.samples} leaves nothing to calibrate on.", "Give at least 1."
            )
        if self.length is not None and self.length < 2:
            raise UsageError(
                f"--calibration-length {self.length} leaves no text behind the first token.",
                "Give at least 2.",
            )
        if self.seed is not None and self.seed < 0:
            raise UsageError(f"--calibration-seed {self.seed} is negative.", "Give 0 or more.")
        if self.observer not in OBSERVERS:
            raise UsageError(
                f"--observer {self.observer} is not a choice.", f"Choose one of {', '.join(OBSERVERS)}."
            )
        most = self.most_samples * self.most_tokens
        if most < FEWEST_TOKENS:
            raise UsageError(
                f"{self.most_samples} samples of {self.most_tokens} tokens are {most} at most; a calibration "
                f"needs at least {FEWEST_TOKENS}.",
                f"Give --calibration-samples {-(-FEWEST_TOKENS // self.most_tokens)} or more, or a greater "
                "--calibration-length.",
            )

    @property
    def most_samples(self) -> int:
        """The most sequences."""
        return self.samples or (128 if self.data is not None else 32)

    @property
    def most_tokens(self) -> int:
        """The most tokens of a sequence, whatever the model."""
        return self.length or (512 if self.data is not None else 64)

    @property
    def given(self) -> tuple[str, ...]:
        """The options that were given, as they are typed."""
        return tuple(_OPTIONS[f.name] for f in fields(self) if getattr(self, f.name) != f.default)

    def tokens_for(self, config: GemmaConfig) -> int:
        """The most tokens of a sequence for a model.

        Raises:
            UsageError: More were asked for than the model was trained for.
        """
        if self.length is not None and self.length > config.context_length:
            raise UsageError(
                f"--calibration-length {self.length} is more than {config.name} was trained for "
                f"({config.context_length} tokens).",
                f"Give at most {config.context_length}.",
            )
        return min(self.most_tokens, config.context_length)


_OPTIONS = {
    "data": "--calibration-data",
    "samples": "--calibration-samples",
    "length": "--calibration-length",
    "seed": "--calibration-seed",
    "observer": "--observer",
}


@dataclass(frozen=True)
class BuildRequest:
    """One build.

    Attributes:
        output: Folder of the bundle; None names it after the model, precision and target.
        size: `tiny`, `2b` or `7b`; None takes the checkpoint's.
        checkpoint: Where the weights are; None takes what ships (tiny) or the local Hugging Face cache.
        random_weights: Build with seeded random weights instead.
        seed: Of the random weights.
        precision: `fp32`, `fp16`, `bf16`, `int8` or `int4`.
        target: `cpu` or `onnx`.
        scheme_name: How the precision is kept, where the target knows several ways; None takes the default.
        block: Columns of a weight that share a scale; None takes the scheme's default.
        calibration: What the scales are made on.
        scales: A file that `gemma-export calibrate` wrote, instead of a calibration.
        no_calibration: Take the scales from the weights alone, and read no text.
        kv_cache: Whether the cache has the scheme's format, or 8 bits.
        max_kl: Keep the layers in 16 bits that a mean KL of at most this needs; None keeps none.
        max_perplexity_increase: Likewise for the perplexity, in percent.
        max_length: Slots of the cache; None takes the model's context length, at most 8192.
        logits: Whether the graph gives the logits of the last token or of all.
        parity: How much the gate measures.
        allow_parity_failure: Keep a bundle that the gate refuses, and say so in its manifest.
        tokenizer: A SentencePiece model to use instead of the one beside the weights.
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
    calibration: CalibrationRequest = CalibrationRequest()
    scales: Path | None = None
    no_calibration: bool = False
    kv_cache: CacheKind = "float"
    max_kl: float | None = None
    max_perplexity_increase: float | None = None
    max_length: int | None = None
    logits: Literal["last", "all"] = "last"
    parity: ParityLevel = "quick"
    allow_parity_failure: bool = False
    tokenizer: Path | None = None
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
                "Add --size tiny|2b|7b, or --checkpoint PATH.",
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
        _check_calibration(self)
        _check_budgets(self)

    @property
    def scheme(self) -> Scheme:
        """How the target keeps the precision's promise."""
        return scheme_for(self.target, self.precision, self.scheme_name)

    @property
    def cache_dtype(self) -> CacheType:
        """Format of the KV cache."""
        return "int8" if self.kv_cache == "int8" else self.scheme.cache

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
