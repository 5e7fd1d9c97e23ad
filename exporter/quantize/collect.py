"""Runs the reference over text and decides, layer by layer, how each linear layer is quantized.

A layer's statistics are there only until every sequence has passed through it: then its weights are read once
more, its scales chosen, its codes written, and the next layer begins. So memory is that of the reference, of
one layer's statistics (7B with Hessians: 0.6 GB), and of one weight's codes.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gemma_export.calibration.observers import ChannelAbsmax, ObserverName
from gemma_export.calibration.recipe import Decision, Layer, Recipe, decide
from gemma_export.calibration.scales import (
    CalibrationText,
    LinearScales,
    Method,
    ScaleTable,
    graph_digest,
)
from gemma_export.calibration.statistics import InputStatistics
from gemma_export.errors import CalibrationError, ScalesError
from gemma_export.exporter import events
from gemma_export.exporter.checkpoints.safetensors import read_safetensors
from gemma_export.exporter.matmul import matmul_precision
from gemma_export.exporter.parity.reference import Reference
from gemma_export.exporter.quantize.codes import CodesFile
from gemma_export.exporter.quantize.emulate import merged_layers
from gemma_export.exporter.quantize.recipes import linear_names, recipes, weight_format, without_text
from gemma_export.exporter.request import Scheme
from gemma_export.exporter.source import Source
from gemma_export.graphs.formats import TABLE, Rounding
from gemma_export.graphs.quantization import LinearQuantization, Quantization
from gemma_export.graphs.tensors import ConcatRows, RowSource
from gemma_export.runtime.bundle import hash_file
from gemma_export.runtime.manifest import CacheScales

CODES_FILE = "scales.safetensors"
STAGE = "calibration"

# The down projection comes before the layer whose rows take its smoothing vector.
_ORDER = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.down_proj", "mlp.gate_up_proj")
_KEY, _VALUE = "self_attn.key", "self_attn.v_proj"


@torch.inference_mode()
def calibrate(
    source: Source,
    target: str,
    scheme: Scheme,
    sequences: Sequence[Sequence[int]],
    *,
    block: int | None,
    text: CalibrationText,
    observer: ObserverName,
    codes_folder: Path,
    listener: events.Listener = events.ignore,
) -> ScaleTable:
    """Finds the numbers of a quantized build.

    Args:
        source: The model.
        target: What the graph will be for.
        scheme: A quantized one of that target.
        sequences: Token ids, each sequence from position 0.
        block: Columns that share a scale; None takes the scheme's default.
        text: What the sequences are, for the table.
        observer: What proposes the scale of an activation that has one for all tokens.
        codes_folder: Where `CODES_FILE` is written, if codes are chosen one by one.
        listener: Told of progress.

    Raises:
        CalibrationError: There is no text, or an activation becomes NaN or infinite on it.
        CheckpointError: A weight holds NaN or infinity.
        UsageError: The blocks do not divide a weight's rows.
        StorageError: The codes cannot be written.
    """
    config = source.config
    tokens = sum(map(len, sequences))
    if not tokens:
        raise CalibrationError(
            "There was no text to calibrate on.", "Give a text of at least a few sentences."
        )
    ways = recipes(config, target, scheme, block, observer)
    path = codes_folder / CODES_FILE
    with events.stage(listener, STAGE, f"{tokens:,} tokens") as facts:
        with CodesFile(path, linear_names(config)) as codes, matmul_precision("medium"):
            collector = _Collector(source, ways, tokens, codes, listener)
            Reference(config, source.weights).run(
                sequences,
                observe=collector.observe,
                wanted=collector.wanted,
                after_layer=collector.after_layer,
                keep_cache=False,
            )
        linears = collector.linears | {TABLE: collector.table().scales}
        facts |= {"tokens": tokens, "smoothed": len(collector.smoothing)}
        facts |= Counter(linear.form for linear in linears.values())
    return ScaleTable(
        target=target,
        scheme=scheme.name,
        graph=graph_digest(config),
        checkpoint=source.checkpoint.digest(),
        text=text,
        smoothing={name: tuple(vector.tolist()) for name, vector in collector.smoothing.items()},
        linears={name: linears[name] for name in (*linear_names(config), TABLE)},
        cache=tuple(collector.cache),
        codes=hash_file(path) if codes.layers else None,
    )


def uncalibrated(source: Source, target: str, scheme: Scheme, block: int | None = None) -> ScaleTable:
    """The table that follows from the weights alone: nothing is smoothed, and nothing was measured.

    8 bits are rounded to nearest, 4 bits with scales of the least squared error.

    Raises:
        UsageError: The scheme needs calibration, or the blocks do not divide a weight's rows.
    """
    ways = recipes(source.config, target, scheme, block)
    linears = {}
    for name in (*linear_names(source.config), TABLE):
        way = without_text(ways[_kind(name)])
        method: Method = "mse" if way.weights.bits == 4 else "nearest"
        linears[name] = LinearScales(way.form, method, way.weights.block)
    return ScaleTable(
        target=target,
        scheme=scheme.name,
        graph=graph_digest(source.config),
        checkpoint=source.checkpoint.digest(),
        text=None,
        smoothing={},
        linears=linears,
    )


def quantization_of(table: ScaleTable, codes: Path | None, target: str) -> Quantization:
    """A table as graph passes take it.

    Args:
        table: The table.
        codes: The file of its codes; None where it has none.
        target: What the graph is for, which decides what formats of weights there are.

    Raises:
        ScalesError: Codes that the table speaks of are not in the file.
        CheckpointError: The file of codes is missing or damaged.
    """
    stored: Mapping[str, RowSource] = {} if codes is None else read_safetensors(codes)
    return Quantization(
        smoothing={name: torch.tensor(vector) for name, vector in table.smoothing.items()},
        linears={name: _quantization(name, linear, stored, target) for name, linear in table.linears.items()},
    )


def _quantization(
    name: str, linear: LinearScales, stored: Mapping[str, RowSource], target: str
) -> LinearQuantization:
    if linear.form == "float":
        return LinearQuantization("float")
    form = weight_format(linear.form, linear.block, target)
    if linear.method != "gptq":
        rounding: Rounding = "mse" if linear.method == "mse" else "nearest"
        return LinearQuantization(linear.form, form, rounding, linear.activation_scale)
    codes, scales = stored.get(f"{name}.codes"), stored.get(f"{name}.scales")
    if codes is None or scales is None:
        raise ScalesError(
            f"The codes of {name} are not in the file of codes.",
            "Make the scales again with `gemma-export calibrate`.",
        )
    return LinearQuantization(linear.form, form, stored=(codes, scales))


def _kind(name: str) -> str:
    """`layers.3.mlp.down_proj` as `mlp.down_proj`."""
    return name.split(".", 2)[-1] if name.startswith("layers.") else name


class _Collector:
    """Sees the activations of one layer after the other, and decides when a layer is done.

    Attributes:
        linears: What was decided, by the layer's name.
        smoothing: Vectors, by the name of what makes the activation.
        cache: Scales of each layer's cache.
        wanted: Names of the activations to be shown.
    """

    def __init__(
        self,
        source: Source,
        ways: Mapping[str, Recipe],
        tokens: int,
        codes: CodesFile,
        listener: events.Listener,
    ) -> None:
        self.linears: dict[str, LinearScales] = {}
        self.smoothing: dict[str, Tensor] = {}
        self.cache: list[CacheScales] = []
        self._config, self._source, self._ways = source.config, source, ways
        self._tokens, self._codes, self._listener = tokens, codes, listener
        self._merged = merged_layers(source.config)
        self._readers = {merged.x: kind for kind, merged in self._merged.items()}
        self.wanted = frozenset((*self._readers, _KEY, _VALUE))
        self._passed = 0  # tokens, counted once for each layer
        self._norm = InputStatistics(source.config.hidden_size, tokens)
        self._begin_layer()

    def _begin_layer(self) -> None:
        self._inputs: dict[str, InputStatistics] = {}
        self._keys, self._values = (ChannelAbsmax(self._config.num_kv_heads) for _ in range(2))

    def observe(self, name: str, array: npt.NDArray[np.float32]) -> None:
        """Looks at an activation that the reference shows."""
        x, activation = torch.from_numpy(array), _kind(name)
        if activation == _KEY:  # [B, K, S, h]
            self._keys.add(x.abs().amax((0, 2, 3)))
        elif activation == _VALUE:  # [B, T, K · h]
            self._values.add(x.reshape(*x.shape[:-1], self._config.num_kv_heads, -1).abs().amax((0, 1, 3)))
        elif activation == "norm":
            self._norm.add(x)
        elif activation in self._readers:
            self._of(activation, x.shape[-1]).add(x)
        if activation == "mlp.product":
            self._passed += x.shape[-2]
            done = self._passed // self._config.num_layers
            self._listener(events.StageProgress(STAGE, done, self._tokens, "tokens"))

    def _of(self, activation: str, channels: int) -> InputStatistics:
        if activation not in self._inputs:
            hessian = self._ways[self._readers[activation]].wanted.weights.bits == 4
            self._inputs[activation] = InputStatistics(channels, self._tokens, hessian=hessian)
        return self._inputs[activation]

    def after_layer(self, index: int) -> None:
        """Decides on a layer that every sequence has passed through."""
        with matmul_precision("highest"):
            self._decide(index)
        self._begin_layer()

    def _decide(self, index: int) -> None:
        prefix = f"layers.{index}"
        for kind in _ORDER:
            merged = self._merged[kind]
            parts = tuple(self._source.weights[f"{prefix}.{part}.weight"] for part in merged.parts)
            layer = Layer(
                ConcatRows(parts),
                self._inputs.pop(merged.x),
                smoothable=merged.reads is not None,
                divisors=self.smoothing.get(f"{prefix}.{merged.smoothed}"),
            )
            decision = decide(layer, self._ways[kind])
            if decision.smoothing is not None:
                self.smoothing[f"{prefix}.{merged.reads}"] = decision.smoothing
            self.linears[f"{prefix}.{kind}"] = decision.scales
            if decision.stored is not None:
                self._codes.add(f"{prefix}.{kind}", *decision.stored)
        self.cache.append(
            CacheScales(tuple(self._keys.scale().tolist()), tuple(self._values.scale().tolist()))
        )

    def table(self) -> Decision:
        """Decides on the embedding table, which the head reads; nothing before it can be smoothed."""
        return decide(Layer(self._source.weights[f"{TABLE}.weight"], self._norm), self._ways[TABLE])
