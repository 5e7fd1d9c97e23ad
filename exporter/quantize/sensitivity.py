"""Measures what each quantized layer costs alone, and all of them together, in one pass over the checkpoint.

Every variant of the model differs from the reference in one linear layer, so up to that layer it is the
reference. From there on its hidden states are carried along beside the reference's: the more layers are done,
the more variants pass through the next one, but each layer is read and rounded once.

Memory: one layer in fp32 and once more as it is stored (2B: 0.9 GB, 7B: 2.2 GB), and the hidden states of
every variant (2B: 75 of 256 tokens, 0.2 GB; 7B: 115, 0.4 GB).

Symbols in shape comments: B texts, T tokens of the longest, d hidden size, P positions that are compared, V
vocabulary.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from gemma_export.calibration.sensitivity import Choice, SensitivityReport, UnitCost
from gemma_export.calibration.text import builtin_texts, read_texts
from gemma_export.errors import UsageError
from gemma_export.exporter import events
from gemma_export.exporter.checkpoints.checkpoint import LazyTensor
from gemma_export.exporter.config import GemmaConfig
from gemma_export.exporter.decoder import DecoderLayer, RMSNorm, layer_masks, rotary_tables, soft_cap
from gemma_export.exporter.parity.reference import Reference, check_sequences, empty_module, row_blocks
from gemma_export.exporter.quantize.divergence import Divergence
from gemma_export.exporter.quantize.emulate import (
    DeviceTable,
    activation_rounding,
    computed_as,
    device_linears,
    merged_shapes,
    stored_bytes,
)
from gemma_export.exporter.request import BuildRequest
from gemma_export.exporter.source import Source, requested_source
from gemma_export.graphs.formats import TABLE
from gemma_export.graphs.quantization import LinearQuantization, Quantization
from gemma_export.runtime.tokenizer import Tokenizer

STAGE = "sensitivity"
REFERENCE, EVERYTHING = "reference", "everything"

SMALL_PARAMETERS = 50_000_000
"""Models of up to so many parameters are measured on more: each variant of a layer is a run of its own."""
SMALL_EXTENT = (16, 128)
"""The most texts for a small model, and the most tokens of each."""
LARGE_EXTENT = (4, 64)
"""Likewise for a large one."""


@dataclass(frozen=True)
class Measurement:
    """What was measured on some sequences.

    Attributes:
        units: Each quantized unit alone, in the model's order.
        everything: All of them together.
        reference_perplexity: Of the checkpoint in fp32.
        tokens: Tokens whose next token was compared.
    """

    units: tuple[UnitCost, ...]
    everything: UnitCost
    reference_perplexity: float
    tokens: int


def measure_sensitivity(
    request: BuildRequest, text: Path | None, listener: events.Listener = events.ignore
) -> SensitivityReport:
    """Calibrates as a build does, and measures every unit of the request's model.

    Args:
        request: What would be built.
        text: A file to measure on; None takes the project's own texts.
        listener: Told of progress.

    Raises:
        GemmaExportError: Something of this cannot be opened, or the precision quantizes nothing.
    """
    # Which itself measures, where a build has a budget.
    from gemma_export.exporter.quantize.calibrate import plan_quantization

    source = requested_source(request)
    with TemporaryDirectory() as folder:
        asked = replace(request, max_kl=None, max_perplexity_increase=None)
        plan = plan_quantization(asked, source, Path(folder), listener)
        if plan is None:
            raise _nothing_quantized()
        return measure_source(source, request, plan.quantization, text, listener)


def measure_source(
    source: Source,
    request: BuildRequest,
    quantization: Quantization,
    text: Path | None,
    listener: events.Listener = events.ignore,
) -> SensitivityReport:
    """Measures every unit of a model whose calibration is known; arguments as of `measure_sensitivity`."""
    passages = builtin_texts() if text is None else read_texts(text)
    small = sum(map(prod, source.config.weight_shapes.values())) <= SMALL_PARAMETERS
    texts, length = SMALL_EXTENT if small else LARGE_EXTENT
    with TemporaryDirectory() as folder:
        tokenizer = Tokenizer(source.write_tokenizer_model(Path(folder)), source.config.vocab_size)
    sequences = [tokenizer.encode(passage.text)[:length] for passage in passages[:texts]]
    with events.stage(listener, STAGE) as facts:
        measured = measure_units(
            source.config, source.weights, quantization, request.target, sequences, listener
        )
        report = SensitivityReport(
            model=source.config.name,
            precision=request.precision,
            target=request.target,
            scheme=request.scheme.name,
            text="the project's own texts" if text is None else str(text),
            tokens=measured.tokens,
            reference_perplexity=measured.reference_perplexity,
            units=measured.units,
            everything=measured.everything,
        )
        facts |= {
            "units": len(report.units),
            "tokens": report.tokens,
            "KL of everything": report.everything.kl,
            "sum of the units": report.sum_of_kl,
        }
    return report


def apply_choice(quantization: Quantization, choice: Choice) -> Quantization:
    """The quantization with the chosen layers in 16 bits.

    Their smoothing stays: it is folded into the weights exactly but for the rounding to 16 bits.
    """
    kept = dict.fromkeys(choice.names, LinearQuantization("float"))
    return replace(quantization, linears={**quantization.linears, **kept})


@torch.inference_mode()
def measure_units(
    config: GemmaConfig,
    weights: Mapping[str, LazyTensor],
    quantization: Quantization,
    target: str,
    sequences: Sequence[Sequence[int]],
    listener: events.Listener = events.ignore,
) -> Measurement:
    """Quantizes every unit alone, and all together, and compares the next tokens with the reference's.

    Args:
        config: The model's shape.
        weights: Canonical name → lazy tensor.
        quantization: How every linear layer and the embedding table are quantized.
        target: Whose arithmetic is emulated.
        sequences: Token ids. Compared is what follows every token but a sequence's last.
        listener: Told of progress in percent.

    Raises:
        UsageError: There is no token that follows another, or nothing is quantized.
        ValueError: A sequence is empty or has a token outside the vocabulary.
    """
    check_sequences(sequences, config.vocab_size)
    shapes = merged_shapes(config)
    quantized = [name for name in shapes if quantization.linears[name].form != "float"]
    if not quantized:
        raise _nothing_quantized()
    lengths = [len(sequence) for sequence in sequences]
    if max(lengths) < 2:
        raise UsageError("The text has no token that follows another.", "Give a text of a few sentences.")
    table = DeviceTable(weights["embed_tokens.weight"], quantization.linears[TABLE])
    progress = _Progress(config, quantized, listener)
    states = _through_layers(config, weights, table, quantization, target, sequences, progress)
    rows = {
        name: torch.cat([x[i, : length - 1] for i, length in enumerate(lengths)])
        for name, x in states.items()
    }
    targets = torch.tensor([token for sequence in sequences for token in sequence[1:]])
    divergence = _at_the_head(config, weights, table, target, rows, targets, progress)
    means = torch.stack([divergence.kl(), divergence.loss_changes(), divergence.agreements().double()])
    figures = dict(zip([n for n in rows if n != REFERENCE], means.mean(-1).T.tolist(), strict=True))  # [M, 3]
    units = tuple(
        UnitCost(
            name,
            quantization.linears[name].form,
            stored_bytes(quantization.linears[name], *shapes[name]),
            2 * prod(shapes[name]),
            *figures[name],
        )
        for name in quantized
    )
    everything = UnitCost(
        EVERYTHING,
        max(units, key=lambda unit: unit.half_bytes).form,
        sum(unit.quantized_bytes for unit in units),
        sum(unit.half_bytes for unit in units),
        *figures[EVERYTHING],
    )
    perplexity = float(divergence.reference_losses().mean().exp())
    return Measurement(units, everything, perplexity, len(targets))


def _nothing_quantized() -> UsageError:
    return UsageError("Nothing is quantized, so nothing has a cost.", "Choose --precision int8 or int4.")


def _through_layers(
    config: GemmaConfig,
    weights: Mapping[str, LazyTensor],
    table: DeviceTable,
    quantization: Quantization,
    target: str,
    sequences: Sequence[Sequence[int]],
    progress: "_Progress",
) -> dict[str, Tensor]:
    """Hidden states [B, T, d] before the final norm: of the reference, of every unit alone, of everything.

    Shorter sequences are filled up behind their end, which no token of theirs sees.
    """
    reference = Reference(config, weights)
    device = Reference(config, {**weights, "embed_tokens.weight": table})
    states = {
        name: pad_sequence(whose.embed(sequences), batch_first=True)
        for name, whose in ((REFERENCE, reference), (TABLE, device), (EVERYTHING, device))
    }
    if table.linear.form == "float":
        del states[TABLE]
    run = _LayerRun(config, *states[REFERENCE].shape[:2])
    layer = empty_module(lambda: DecoderLayer(config))
    for i in range(config.num_layers):
        reference.load(layer, f"layers.{i}")
        linears = device_linears(layer, f"layers.{i}", quantization, target)
        alone = {}
        for name, parts in linears.items():
            with computed_as(parts):
                alone[name] = run(layer, i, states[REFERENCE])
        with computed_as(chain.from_iterable(linears.values())):
            everything = run(layer, i, states.pop(EVERYTHING))
        for name in states:
            states[name] = run(layer, i, states[name])
        states |= {**alone, EVERYTHING: everything}
        progress.layer_done(len(states))
    return states


class _LayerRun:
    """Takes texts of one length through a layer, each from position 0."""

    def __init__(self, config: GemmaConfig, texts: int, length: int) -> None:
        cos, sin = rotary_tables(config, length)
        self._cos, self._sin = cos[None, None], sin[None, None]  # [1, 1, T, h/2]
        self._positions = torch.arange(length).expand(texts, length)
        self._masks = layer_masks(config, self._positions[:1], length)
        self._cache = torch.zeros(texts, config.num_kv_heads, length, config.head_dim)

    def __call__(self, layer: DecoderLayer, index: int, x: Tensor) -> Tensor:
        """Hidden states [B, T, d] after the layer of that number; x is not changed."""
        mask = self._masks[index]
        out, _, _ = layer(x, self._positions, self._cos, self._sin, mask, self._cache, self._cache)
        hidden: Tensor = out
        return hidden


def _at_the_head(
    config: GemmaConfig,
    weights: Mapping[str, LazyTensor],
    table: DeviceTable,
    target: str,
    rows: Mapping[str, Tensor],
    targets: Tensor,
    progress: "_Progress",
) -> Divergence:
    """Compares the logits of all variants with the reference's, for hidden states [P, d] by name."""
    norm = empty_module(lambda: RMSNorm(config.hidden_size, config.rms_norm_eps))
    Reference(config, weights).load(norm, "norm")
    rounding = activation_rounding(table.linear, target)
    of_table = (TABLE, EVERYTHING)
    inputs = {name: rounding(norm(x)) if name in of_table else norm(x) for name, x in rows.items()}
    reference = inputs.pop(REFERENCE)
    divergence, cap = Divergence(len(inputs), targets), config.final_softcap

    def logits(original: Tensor, stored: Tensor) -> Iterator[Tensor]:
        for name, x in inputs.items():
            yield soft_cap(F.linear(x, stored if name in of_table else original), cap)

    for start, stop, block in row_blocks(table.source):
        original, stored = block.float(), table.stored(block, start)
        divergence.add(start, soft_cap(F.linear(reference, original), cap), logits(original, stored))
        progress.rows_done(stop - start)
    return divergence


class _Progress:
    """How much of the arithmetic is done, in percent."""

    def __init__(self, config: GemmaConfig, quantized: Sequence[str], listener: events.Listener) -> None:
        self._listener = listener
        self._width = config.hidden_size
        self._layer = config.other_parameters // config.num_layers
        of_layers = [int(name.split(".")[1]) for name in quantized if name != TABLE]
        self._variants = len(quantized) + 2
        passes = sum(config.num_layers - i for i in of_layers)
        passes += config.num_layers * (self._variants - len(of_layers))
        self._total = passes * self._layer + self._variants * config.embedding_parameters
        self._done = 0

    def layer_done(self, variants: int) -> None:
        """A layer was passed by so many variants, the reference and everything among them."""
        self._add(variants * self._layer)

    def rows_done(self, rows: int) -> None:
        """So many rows of the head were."""
        self._add(self._variants * rows * self._width)

    def _add(self, work: int) -> None:
        self._done += work
        self._listener(events.StageProgress(STAGE, 100 * self._done // self._total, 100, "percent"))
