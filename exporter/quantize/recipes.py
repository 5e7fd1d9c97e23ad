"""From a scheme to the arithmetic of its layers: the formats of weights, and what rounds inputs."""

from collections.abc import Sequence

from gemma_export.calibration.arithmetic import Arithmetic, InputRounding
from gemma_export.calibration.observers import ObserverName
from gemma_export.calibration.recipe import Recipe
from gemma_export.errors import UsageError
from gemma_export.exporter.config import GemmaConfig
from gemma_export.exporter.quantize.emulate import merged_layers, merged_shapes
from gemma_export.exporter.request import Products, Scheme
from gemma_export.graphs.formats import TABLE, Form, WeightFormat


def linear_names(config: GemmaConfig) -> list[str]:
    """The linear layers as the graph merges them, in its order; without the embedding table."""
    return [name for name in merged_shapes(config) if name != TABLE]


def weight_format(form: Form, block: int | None, target: str) -> WeightFormat:
    """The format of a weight of which the form and the block size are known."""
    # Of the products that take blocks, onnxruntime's takes a scale of any sign, TensorRT's a positive one.
    negative = target in ("cpu", "cuda") and form in ("w8", "w4")
    return WeightFormat(4 if form == "w4" else 8, block, negative)


def recipes(
    config: GemmaConfig,
    target: str,
    scheme: Scheme,
    block: int | None = None,
    observer: ObserverName = "absmax",
) -> dict[str, Recipe]:
    """How the layers of each kind are to be quantized.

    Args:
        config: The model's shape.
        target: What the graph is for.
        scheme: A quantized one.
        block: Columns that share a scale; None takes the scheme's default.
        observer: What proposes the scale of x where it has one for all tokens.

    Returns:
        By the last two parts of a layer's name, as `mlp.down_proj`; and the embedding table's, as `TABLE`.

    Raises:
        UsageError: The blocks do not divide the rows of a weight.
    """
    products = _products(scheme)
    wanted = _arithmetic(products.form, products.blocks[0] if block is None else block, target)
    other = products.otherwise
    otherwise = None if other is None else _arithmetic(other, products.otherwise_block, target)
    shapes = merged_shapes(config)
    columns = {kind: shapes[f"layers.0.{kind}"][1] for kind in merged_layers(config)}
    fitting = [size for size in products.blocks if all(_divides(size, width) for width in columns.values())]
    found = {}
    for kind, width in columns.items():
        _check_block(kind, width, wanted.weights.block, fitting)
        usable = otherwise is not None and _divides(otherwise.weights.block, width)
        found[kind] = Recipe(wanted, otherwise if usable else None, observer)
    _check_block(TABLE, config.hidden_size, products.table_block, [])
    return found | {TABLE: Recipe(_arithmetic("w8", products.table_block, target))}


def without_text(recipe: Recipe) -> Arithmetic:
    """The arithmetic of a layer about which nothing is known but its weight.

    Raises:
        UsageError: Its input needs a scale, and there is no other form.
    """
    if recipe.wanted.input_rounding != "tensor":
        return recipe.wanted
    if recipe.otherwise is None:
        raise UsageError(
            f"The form {recipe.wanted.form} needs scales that only calibration finds.",
            "Leave --no-calibration out.",
        )
    return recipe.otherwise


def _products(scheme: Scheme) -> Products:
    if scheme.products is None:
        raise ValueError(f"the scheme {scheme.name} quantizes nothing")
    return scheme.products


def _arithmetic(form: Form, block: int | None, target: str) -> Arithmetic:
    rounding: InputRounding = "block" if target == "cpu" else "none"  # MatMulNBits rounds what it reads.
    if form == "w8a8-token":
        rounding = "token"
    elif form == "w8a8-tensor":
        rounding = "tensor"
    return Arithmetic(form, weight_format(form, block, target), rounding)


def _option(block: int | None) -> str:
    """What is said for blocks of a size."""
    return "no --block" if block is None else f"--block {block}"


def _divides(block: int | None, columns: int) -> bool:
    return block is None or columns % block == 0


def _check_block(name: str, columns: int, block: int | None, fitting: Sequence[int | None]) -> None:
    if not _divides(block, columns):
        raise UsageError(
            f"Blocks of {block} columns do not divide the {columns} of {name}.",
            f"Choose {' or '.join(map(_option, fitting))}." if fitting else "Choose --precision fp16.",
        )
