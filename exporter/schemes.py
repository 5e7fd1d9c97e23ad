"""How each target keeps the promise that a precision makes: one table of everything that can be built."""

from dataclasses import dataclass
from typing import Literal

from gemma_export.errors import UsageError
from gemma_export.graphs.formats import Form

FloatType = Literal["float32", "float16", "bfloat16"]
StorageType = Literal["float32", "float16", "bfloat16", "int8", "int4"]
CacheType = Literal["float32", "float16", "bfloat16", "int8"]


@dataclass(frozen=True)
class Products:
    """How a quantized scheme computes its products.

    Attributes:
        form: The form of every linear layer that can take it.
        bits: Of a weight.
        blocks: Columns that may share a scale, the default first; None for a scale per row.
        table_block: Likewise in the embedding table, which always has 8 bits.
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
    # 256 columns is the largest block of onnxruntime's MatMulNBits: its scales are a 128th of the codes.
    ("cpu", "int8"): (
        Scheme("w8a16", "int8", "float32", "float32", Products("w8", 8, (None, 256, 128, 64, 32), None)),
        Scheme(
            "w8a8-dynamic",
            "int8",
            "float32",
            "float32",
            Products("w8a8-token", 8, (None,), 256, otherwise="w8", otherwise_block=256),
        ),
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
    # A GPU's kernels of MatMulNBits for many tokens know blocks of up to 128 columns.
    ("cuda", "fp16"): (_FP16,),
    ("cuda", "bf16"): (_BF16,),
    ("cuda", "int8"): (Scheme("w8a16", "int8", "float16", "float16", Products("w8", 8, (128, 64, 32), 128)),),
    ("cuda", "int4"): (Scheme("w4a16", "int4", "float16", "float16", Products("w4", 4, (128, 64, 32), 128)),),
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
            f"Choose one of {', '.join(TARGETS)}; --target onnx is the graph that other runtimes take.",
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
