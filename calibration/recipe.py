"""Decides how one linear layer is quantized, its smoothing, form and scales, by the error of its outputs.

Every choice is made by one measure: the error that a product leaves in the outputs of some rows of the
weight, for the tokens that were kept of the layer's input (`arithmetic.Target`). The rows are evenly spread,
and few enough that trying a way costs little beside running the layer.

Symbols in shape comments: n rows of the weight that ways are tried on, N rows in all, K columns, G groups of
columns that share a scale.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from gemma_export.calibration.arithmetic import Arithmetic, Target
from gemma_export.calibration.gptq import Feedback, gptq
from gemma_export.calibration.observers import ObserverName, make_observer
from gemma_export.calibration.scales import LinearScales, Method
from gemma_export.calibration.smoothing import Smoothing, Vectors, search
from gemma_export.calibration.statistics import InputStatistics
from gemma_export.graphs.quantization import decode
from gemma_export.graphs.tensors import RowSource, ScaleRows, not_finite

MOST_ROWS = 1024
MOST_VALUES = 2**22
"""Of a weight, what ways are tried on: so many rows, or fewer where they are long."""
RUN = 8
"""Rows that are read together."""
BLOCK_BYTES = 64 << 20
"""Size in fp32 of the blocks of rows in which a weight is read."""
DEAR = 4.0
"""Rounding x costs too much when it makes the error more than so many times what rounding W alone leaves."""
NEGLIGIBLE = 1e-4
"""An error, a hundredth of the outputs in root mean square, that is never too much."""


@dataclass(frozen=True)
class Recipe:
    """How layers of one kind are to be quantized.

    Attributes:
        wanted: The arithmetic of every layer that bears it.
        otherwise: The arithmetic of a layer in which rounding x costs too much; None where there is no other.
        observer: What proposes the scale of x where it has one for all tokens.
    """

    wanted: Arithmetic
    otherwise: Arithmetic | None = None
    observer: ObserverName = "absmax"


@dataclass(frozen=True)
class Decision:
    """How one layer is quantized.

    Attributes:
        scales: What the table says of it.
        smoothing: s, what its input is divided by, fp32 [K]; None for nothing.
        stored: Codes int8 [N, K] and scales fp32 [N, G] of W · s, its last rows divided where they are to be,
            where they were chosen one by one.
    """

    scales: LinearScales
    smoothing: Tensor | None = None
    stored: tuple[Tensor, Tensor] | None = None


class Layer:
    """One linear layer as calibration sees it.

    Args:
        weight: W [N, K].
        inputs: What it reads.
        smoothable: Whether what makes x can be divided by a vector.
        divisors: What the last rows of W are divided by when they are stored, as the outputs that they make
            are smoothed: fp32 [.. <= N]. What reads these outputs multiplies with it again, so errors are
            those without it.

    Raises:
        CalibrationError: There were no tokens.
        CheckpointError: The weight holds NaN or infinity.
    """

    def __init__(
        self,
        weight: RowSource,
        inputs: InputStatistics,
        *,
        smoothable: bool = False,
        divisors: Tensor | None = None,
    ) -> None:
        self.weight, self.inputs = weight, inputs
        self.stored = weight if divisors is None else _divided(weight, divisors)
        self.x = inputs.sample
        self.rows = _spread_rows(weight)
        self.target = Target(self.x, self.rows)
        self.vectors = Vectors(inputs, _column_absmax(weight)) if smoothable else None

    def smoothed(self, vector: Tensor | None) -> tuple[Tensor, Tensor]:
        """The sample and the rows with a vector between them."""
        return (self.x, self.rows) if vector is None else (self.x / vector, self.rows * vector)


def decide(layer: Layer, recipe: Recipe) -> Decision:
    """The least error that the recipe allows, in the form it wants unless that is too dear.

    Raises:
        CalibrationError: What was observed has NaN or infinity in it.
    """
    if recipe.wanted.weights.bits == 4:
        return _decide_codes(layer, recipe.wanted)
    wanted = _best(layer, recipe.wanted, recipe.observer)
    tried = {} if layer.vectors is None else {f"{wanted.form} without smoothing": wanted.smoothing.plain}
    if recipe.otherwise is None:
        return wanted.decision(tried)
    tried[f"{wanted.form} with x as it is"] = wanted.weight_error
    if wanted.smoothing.error <= max(DEAR * wanted.weight_error, NEGLIGIBLE):
        return wanted.decision(tried)
    otherwise = _best(layer, recipe.otherwise, recipe.observer)
    if otherwise.smoothing.error >= wanted.smoothing.error:
        return wanted.decision(tried | {otherwise.form: otherwise.smoothing.error})
    return otherwise.decision(tried | {wanted.form: wanted.smoothing.error})


@dataclass(frozen=True)
class _Trial:
    """An arithmetic with the smoothing that suits it best."""

    arithmetic: Arithmetic
    smoothing: Smoothing
    weight_error: float  # The least that rounding W alone leaves, smoothed or not

    @property
    def form(self) -> str:
        return self.arithmetic.form

    def decision(self, tried: dict[str, float]) -> Decision:
        arithmetic = self.arithmetic
        scales = LinearScales(
            form=arithmetic.form,
            method="nearest",
            block=arithmetic.weights.block,
            activation_scale=arithmetic.input_scale,
            error=self.smoothing.error,
            candidates=tried,
        )
        return Decision(scales, self.smoothing.vector)


def _best(layer: Layer, arithmetic: Arithmetic, observer: ObserverName) -> _Trial:
    def error_of(vector: Tensor | None) -> float:
        x, rows = layer.smoothed(vector)
        rounded = _with_scale(layer, arithmetic, observer, vector).round_input(x)
        return layer.target.error(rounded, arithmetic.round_weight(rows))

    smoothing = search(layer.vectors, error_of)
    # A vector that makes x bearable may do so at W's cost: that is part of what rounding x costs.
    pairs = [layer.smoothed(vector) for vector in (None, smoothing.vector)]
    return _Trial(
        _with_scale(layer, arithmetic, observer, smoothing.vector),
        smoothing,
        min(layer.target.error(x, arithmetic.round_weight(rows)) for x, rows in pairs),
    )


def _with_scale(
    layer: Layer, arithmetic: Arithmetic, observer: ObserverName, vector: Tensor | None
) -> Arithmetic:
    """The arithmetic with the scale of x / s, where it has one for all tokens."""
    if arithmetic.input_rounding != "tensor":
        return arithmetic
    seen = make_observer(observer)
    seen.add(layer.smoothed(vector)[0])
    if observer == "absmax":  # The largest of all tokens, not only of the sample.
        largest = layer.inputs.absmax
        seen.add(largest if vector is None else largest / vector)
    return arithmetic.with_input_scale(seen.scale())


def _decide_codes(layer: Layer, arithmetic: Arithmetic) -> Decision:
    """Of 4 bits: rounded one by one with clipping scales (AWQ), or each making up for the others (GPTQ)."""
    form, target = arithmetic.weights, layer.target

    def error_of(vector: Tensor | None) -> float:
        x, rows = layer.smoothed(vector)
        return target.error(arithmetic.round_input(x), arithmetic.round_weight(rows, "mse"))

    smoothing = search(layer.vectors, error_of)
    vector = smoothing.vector
    x, rows = layer.smoothed(vector)
    feedback = Feedback(layer.inputs.hessian, form.block).parts(vector)
    errors = {
        "nearest without smoothing": target.error(
            arithmetic.round_input(layer.x), arithmetic.round_weight(layer.rows)
        ),
        "mse without smoothing": smoothing.plain,
        "mse": smoothing.error,
        "gptq": target.error(arithmetic.round_input(x), decode(*gptq(rows, feedback, form), form)),
    }
    method: Method = "gptq" if errors["gptq"] < errors["mse"] else "mse"
    scales = LinearScales(
        form=arithmetic.form,
        method=method,
        block=form.block,
        error=errors.pop(method),
        candidates=errors,
    )
    if method == "mse":
        return Decision(scales, vector)
    codes = torch.empty(layer.weight.shape, dtype=torch.int8)
    groups = torch.empty(len(codes), form.groups(codes.shape[1]))
    for start, stop, block in _blocks(layer.stored):
        block = block if vector is None else block * vector
        codes[start:stop], groups[start:stop] = gptq(block, feedback, form)
    return Decision(scales, vector, (codes, groups))


def _divided(weight: RowSource, divisors: Tensor) -> RowSource:
    """A weight [N, K] with its last rows divided."""
    return ScaleRows(weight, torch.cat((torch.ones(weight.shape[0] - len(divisors)), 1 / divisors)))


def _spread_rows(weight: RowSource) -> Tensor:
    """Some rows [n, K], in short runs that are evenly spread; all where they are few."""
    rows, columns = weight.shape
    count = max(RUN, min(MOST_ROWS, MOST_VALUES // columns))
    runs = count // RUN
    spans = [(0, rows)]
    if rows > count:
        spans = [(start, start + RUN) for start in (i * (rows - RUN) // runs for i in range(runs))]
    kept = torch.cat([weight.read(*span) for span in spans]).float()
    if not kept.isfinite().all():
        raise not_finite(weight)
    return kept


def _column_absmax(weight: RowSource) -> Tensor:
    """The largest magnitude of each column: fp32 [K]."""
    largest = torch.zeros(weight.shape[1])
    for _, _, block in _blocks(weight):
        torch.maximum(largest, block.abs().amax(0), out=largest)
    return largest


def _blocks(weight: RowSource) -> Iterator[tuple[int, int, Tensor]]:
    """All rows in blocks, in fp32."""
    rows, columns = weight.shape
    step = max(1, BLOCK_BYTES // (4 * columns))
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        yield start, stop, weight.read(start, stop).float()
