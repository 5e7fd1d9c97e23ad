"""Linear layers that compute what a device computes: weights as stored there, activations as rounded there.

A layer's weights W [N, K] are stored with the smoothing folded in: columns times the vector s of what makes
x, and, where the outputs are divided by a vector of their own (the up half), rows divided by that. So the
device computes round(x / s) · round(W · s)ᵀ, which is x · Wᵀ but for the rounding: a layer can be emulated
alone while all others stay as they are.

Symbols in shape comments: n rows of one projection, N of the merged layer, K columns, R rows of a block.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gemma_export.exporter.config import GemmaConfig
from gemma_export.exporter.decoder import DecoderLayer
from gemma_export.graphs.formats import TABLE
from gemma_export.graphs.quantization import (
    LinearQuantization,
    Quantization,
    decode,
    round_per_block,
    round_per_tensor,
    round_per_token,
    round_trip,
)
from gemma_export.graphs.tensors import OfSource

BLOCK_BYTES = 16 << 20
"""Size in fp32 of the blocks of rows that are rounded at once: the search for scales makes several copies."""

Rounder = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class _Merged:
    """A layer of the graph, and the projections it is made of.

    Attributes:
        parts: Names within the decoder layer, in the order of their rows.
        x: What it reads, by the names of `parity.observation`.
        reads: Whose smoothing vector x is divided by.
        smoothed: The part whose outputs are divided by its own smoothing vector.
    """

    parts: tuple[str, ...]
    x: str
    reads: str | None = None
    smoothed: str | None = None


def merged_layers(config: GemmaConfig) -> dict[str, _Merged]:
    """The linear layers of a decoder layer as the graph merges them, by their names in it."""
    projections = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    norm = config.mlp_norm
    return {
        "self_attn.qkv_proj": _Merged(projections, "input_layernorm", "input_layernorm"),
        "self_attn.o_proj": _Merged(("self_attn.o_proj",), "self_attn.attended"),
        "mlp.gate_up_proj": _Merged(("mlp.gate_proj", "mlp.up_proj"), norm, norm, "mlp.up_proj"),
        "mlp.down_proj": _Merged(("mlp.down_proj",), "mlp.product", "mlp.up_proj"),
    }


@dataclass(frozen=True)
class DeviceLinear:
    """A projection as a device computes it.

    Attributes:
        module: The projection.
        weight: What stands for its weight there: fp32 [n, K], of x as `prepare` makes it.
        prepare: What happens to x before the product.
    """

    module: nn.Linear
    weight: Tensor
    prepare: Rounder

    def forward(self, x: Tensor) -> Tensor:
        """The product [.., n] of x [.., K]."""
        return F.linear(self.prepare(x), self.weight)


def device_linears(
    layer: DecoderLayer, prefix: str, quantization: Quantization, target: str
) -> dict[str, tuple[DeviceLinear, ...]]:
    """The quantized linear layers of a decoder layer, by the names that the graph gives them.

    It takes as much memory as the layer. What keeps 16 bits is not among them: half-precision weights differ
    from the checkpoint's by less than a thousandth of what 8 bits do.

    Args:
        layer: The layer with its parameters in fp32; they are read now.
        prefix: Its name, `layers.3`.
        quantization: How the graph is quantized.
        target: Whose arithmetic is emulated.
    """
    found: dict[str, tuple[DeviceLinear, ...]] = {}
    for name, merged in merged_layers(layer.config).items():
        linear = quantization.linears[f"{prefix}.{name}"]
        if linear.form == "float":
            continue
        columns = None if merged.reads is None else quantization.smoothing.get(f"{prefix}.{merged.reads}")
        prepare = _prepared(columns, activation_rounding(linear, target))
        parts: list[DeviceLinear] = []
        first = 0
        for part in merged.parts:
            module = layer.get_submodule(part)
            assert isinstance(module, nn.Linear)
            rows = quantization.smoothing.get(f"{prefix}.{part}") if part == merged.smoothed else None
            weight = _stored_weight(module.weight, linear, columns, rows, first)
            parts.append(DeviceLinear(module, weight, prepare))
            first += module.out_features
        found[f"{prefix}.{name}"] = tuple(parts)
    return found


@contextmanager
def computed_as(linears: Iterable[DeviceLinear]) -> Iterator[None]:
    """While the context lasts, projections compute as a device does; no parameter is touched."""
    changed: list[nn.Linear] = []
    try:
        for linear in linears:
            # An attribute of the instance stands before the method of its class.
            linear.module.__dict__["forward"] = linear.forward
            changed.append(linear.module)
        yield
    finally:
        for module in changed:
            del module.__dict__["forward"]


@dataclass(frozen=True)
class DeviceTable(OfSource):
    """The embedding table as it comes back from storage: what is looked up, and the head's weight.

    Attributes:
        source: The table as the checkpoint has it.
        linear: How it is quantized.
    """

    linear: LinearQuantization

    @property
    def dtype(self) -> torch.dtype:
        """Always float32."""
        return torch.float32

    def read(self, start: int, stop: int) -> Tensor:
        """Rows [start, stop), fp32 [R, d]."""
        return self.stored(self.source.read(start, stop), start)

    def stored(self, rows: Tensor, start: int) -> Tensor:
        """What becomes of the source's rows [R, d] from `start` on: fp32 [R, d]."""
        if self.linear.form == "float":
            return rows.float()
        if self.linear.stored is not None:
            return _decoded(self.linear, start, start + len(rows))
        assert self.linear.format is not None
        return round_trip(rows.float(), self.linear.format, self.linear.rounding)


def activation_rounding(linear: LinearQuantization, target: str) -> Rounder:
    """What a target does to the activations [.., K] of a layer, after smoothing.

    On `cpu` onnxruntime's MatMulNBits (accuracy level 4) rounds x to 8 bits too, a block of columns at once;
    elsewhere only the forms `w8a8-token` and `w8a8-tensor` round it.
    """
    match linear.form:
        case "w8a8-token":
            return round_per_token
        case "w8a8-tensor":
            scale = linear.activation_scale
            assert scale is not None
            return lambda x: round_per_tensor(x, scale)
        case "w8" | "w4" if target == "cpu":
            form = linear.format
            assert form is not None
            return lambda x: round_per_block(x, form)
        case _:
            return _unchanged


def stored_bytes(linear: LinearQuantization, rows: int, columns: int) -> int:
    """Bytes of a weight [rows, columns] as it is stored: codes and their scales, or 16-bit numbers."""
    if linear.form == "float":
        return 2 * rows * columns
    assert linear.format is not None
    scale = 2 if linear.format.short_scales else 4
    return rows * (columns * linear.format.bits // 8 + scale * linear.format.groups(columns))


def merged_shapes(config: GemmaConfig) -> dict[str, tuple[int, int]]:
    """Name → shape [N, K] of the embedding table and of every merged layer, in the model's order."""
    merged = {TABLE: (config.vocab_size, config.hidden_size)}
    shapes = config.weight_shapes
    for i in range(config.num_layers):
        for name, layer in merged_layers(config).items():
            parts = [shapes[f"layers.{i}.{part}.weight"] for part in layer.parts]
            merged[f"layers.{i}.{name}"] = (sum(part[0] for part in parts), parts[0][1])
    return merged


def _stored_weight(
    weight: Tensor, linear: LinearQuantization, columns: Tensor | None, rows: Tensor | None, first: int
) -> Tensor:
    """A projection's weight [n, K] as the device has it, with the division of its rows undone.

    Args:
        weight: As the checkpoint has it.
        linear: How the merged layer is quantized.
        columns: The vector [K] that x is divided by.
        rows: The vector [n] that the outputs are divided by.
        first: Where the projection's rows begin in the merged layer.
    """
    stored = torch.empty_like(weight, dtype=torch.float32)
    step = max(1, BLOCK_BYTES // (4 * weight.shape[1]))
    for start in range(0, len(weight), step):
        stop = min(start + step, len(weight))
        divisor = None if rows is None else rows[start:stop, None]
        if linear.stored is not None:
            block = _decoded(linear, first + start, first + stop)
        else:
            assert linear.format is not None
            block = weight[start:stop].float()
            if columns is not None:
                block = block * columns
            if divisor is not None:
                block = block / divisor
            block = round_trip(block, linear.format, linear.rounding)
        stored[start:stop] = block if divisor is None else block * divisor
    return stored


def _decoded(linear: LinearQuantization, start: int, stop: int) -> Tensor:
    """Rows of a layer whose codes are stored."""
    assert linear.stored is not None
    assert linear.format is not None
    codes, scales = (source.read(start, stop) for source in linear.stored)
    return decode(codes, scales.float(), linear.format)


def _prepared(columns: Tensor | None, rounding: Rounder) -> Rounder:
    """Divides by the smoothing vector, then rounds."""
    if columns is None:
        return rounding
    return lambda x: rounding(x / columns)


def _unchanged(x: Tensor) -> Tensor:
    return x
