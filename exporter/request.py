"""What a build is asked for: frozen, complete, and possible.

A combination that cannot be built is refused here, with the nearest thing that can be, before anything is
read.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gemma_export.errors import UsageError
from gemma_export.exporter.config import SIZES, GemmaConfig

FloatType = Literal["float32", "float16", "bfloat16"]
ParityLevel = Literal["none", "quick", "full"]

PARITY_LEVELS: tuple[ParityLevel, ...] = ("none", "quick", "full")
LOGITS = ("last", "all")


@dataclass(frozen=True)
class Scheme:
    """How a target keeps the promise that a precision makes.

    Attributes:
        name: As the manifest calls it.
        storage: Format of the weights on disk.
        compute: Format of the arithmetic, fp32 islands aside.
        cache: Format of the KV cache.
    """

    name: str
    storage: FloatType
    compute: FloatType
    cache: FloatType


SCHEMES: dict[tuple[str, str], Scheme] = {
    ("cpu", "fp32"): Scheme("fp32", "float32", "float32", "float32"),
    # onnxruntime's CPU provider has no 16-bit products on x86: it would convert back and forth around each.
    ("cpu", "fp16"): Scheme("fp16-storage", "float16", "float32", "float32"),
    ("cpu", "bf16"): Scheme("bf16-storage", "bfloat16", "float32", "float32"),
    ("onnx", "fp32"): Scheme("fp32", "float32", "float32", "float32"),
    ("onnx", "fp16"): Scheme("fp16", "float16", "float16", "float16"),
    ("onnx", "bf16"): Scheme("bf16", "bfloat16", "bfloat16", "bfloat16"),
}
"""Everything that can be built, by target and precision."""

TARGETS = tuple(dict.fromkeys(target for target, _ in SCHEMES))
PRECISIONS = tuple(dict.fromkeys(precision for _, precision in SCHEMES))


def scheme_for(target: str, precision: str) -> Scheme:
    """The scheme of a target and a precision.

    Raises:
        UsageError: There is none; the hint names what there is.
    """
    if target not in TARGETS:
        raise UsageError(
            f"There is no target {target!r}.",
            f"The targets are {' and '.join(TARGETS)}; --target onnx is the graph that other runtimes take.",
        )
    scheme = SCHEMES.get((target, precision))
    if scheme is None:
        possible = [p for t, p in SCHEMES if t == target]
        raise UsageError(
            f"The precision {precision!r} cannot be built for the target {target}.",
            f"Choose one of {', '.join(possible)}; --precision {possible[-1]} is the smallest.",
        )
    return scheme


@dataclass(frozen=True)
class BuildRequest:
    """One build.

    Attributes:
        output: Folder of the bundle; None names it after the model, precision and target.
        size: `tiny`, `2b` or `7b`; None takes the checkpoint's.
        checkpoint: Where the weights are; None takes what ships (tiny) or the local Hugging Face cache.
        random_weights: Build with seeded random weights instead.
        seed: Of the random weights.
        precision: `fp32`, `fp16` or `bf16`.
        target: `cpu` or `onnx`.
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
    max_length: int | None = None
    logits: Literal["last", "all"] = "last"
    parity: ParityLevel = "quick"
    allow_parity_failure: bool = False
    tokenizer: Path | None = None
    force: bool = False

    def __post_init__(self) -> None:
        scheme_for(self.target, self.precision)
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

    @property
    def scheme(self) -> Scheme:
        """How the target keeps the precision's promise."""
        return scheme_for(self.target, self.precision)

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
