"""Traces the decoder to an ONNX graph without allocating a weight.

The module is built and traced under a fake-tensor mode: every parameter has a shape and no storage. Its
first layers, one of each kind at least, are traced and then repeated (`graphs.unroll`). What comes out is the
RAW graph: plain operators, one node list for the whole model, initializers that are names and shapes only.
`bind_weights` then gives each its streamed value.
"""

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import onnx_ir as ir
import onnxscript.optimizer
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from gemma_export.errors import GraphError
from gemma_export.exporter.config import GemmaConfig
from gemma_export.exporter.decoder import Decoder, rotary_frequencies
from gemma_export.graphs.tensors import RotaryTable, RowSource, StreamedTensor, in_format
from gemma_export.graphs.unroll import LAYER_EDGE, unroll
from gemma_export.runtime.kv_cache import layer_slots
from gemma_export.runtime.rolling import RollingCache

OPSET = 24
"""The first opset with TensorScatter and with Attention over an explicit cache."""


class _MarkedDecoder(Decoder):
    """A decoder's first layers, with the residual stream before and after each of them."""

    def forward(  # type: ignore[override]  # Traced, never called in the place of a decoder.
        self, input_ids: Tensor, position_ids: Tensor, past_key_values: list[Tensor]
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        states, presents = self.run_layers(self.embed(input_ids), position_ids, past_key_values)
        return self.head(states[-1]), presents, states


def _templates(config: GemmaConfig) -> list[int]:
    """For every layer the first of its kind: the one that it is a copy of."""
    return [config.windows.index(window) for window in config.windows]


def trace(
    config: GemmaConfig,
    max_length: int,
    *,
    all_logits: bool = False,
    rolling: RollingCache | None = None,
) -> ir.Model:
    """The RAW graph of the decoder in fp32, with dynamic batch and token axes; arguments as the decoder's.

    Initializers have canonical names and no values.
    """
    templates = _templates(config)
    count = max(templates) + 1
    first = replace(config, num_layers=count, layer_kinds=config.layer_kinds[:count])
    parts = [f"{i}.{part}" for i in range(count) for part in ("key", "value")]
    with FakeTensorMode():
        decoder = _MarkedDecoder(first, max_length, all_logits=all_logits, rolling=rolling).eval()
        # Sizes of 0 and 1 would be specialised away, so the example has two rows of three tokens.
        tokens = torch.zeros(2, 3, dtype=torch.int64)
        slots = layer_slots(count, max_length, rolling)
        cache = [torch.zeros(2, config.num_kv_heads, size, config.head_dim) for size in slots for _ in "kv"]
        batch, length = torch.export.Dim("batch"), torch.export.Dim("tokens")
        program = torch.export.export(
            decoder,
            (tokens, tokens.clone(), cache),
            dynamic_shapes=({0: batch, 1: length}, {0: batch, 1: length}, [{0: batch}] * len(cache)),
        )
        with warnings.catch_warnings(), _quiet_exporter():
            warnings.simplefilter("ignore")  # About renamed axes; ours are named below.
            exported = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=OPSET,
                optimize=False,
                verify=False,
                verbose=False,
                input_names=["input_ids", "position_ids", *(f"past_key_values.{part}" for part in parts)],
                output_names=[
                    "logits",
                    *(f"present.{part}" for part in parts),
                    *(f"{LAYER_EDGE}.{i}" for i in range(count + 1)),
                ],
            )
    if exported is None:
        raise GraphError("The decoder could not be traced.", "This is a defect: please report it.")
    model = exported.model
    for value in model.graph.initializers.values():
        value.const_value = None  # A fake tensor: it has no values, and no optimizer may look for them.
    with _quiet_exporter():
        onnxscript.optimizer.optimize_ir(model)
    unroll(model, templates)
    _name_axes(model)
    model.producer_name = "gemma-export"
    return model


def bind_weights(model: ir.Model, config: GemmaConfig, weights: Mapping[str, RowSource]) -> None:
    """Gives every initializer without a value its weight, in fp32, or its rotary table.

    Raises:
        GraphError: The graph has an initializer of another name or shape.
    """
    positions, frequencies = _positions(model), rotary_frequencies(config)
    values: dict[str, RowSource] = {
        **weights,
        "rotary_cos": RotaryTable("rotary_cos", frequencies, positions, torch.cos),
        "rotary_sin": RotaryTable("rotary_sin", frequencies, positions, torch.sin),
    }
    for name, value in model.graph.initializers.items():
        if value.const_value is not None:
            continue
        source = values.get(name)
        if source is None or value.shape is None or tuple(value.shape) != source.shape:
            found = "no weight" if source is None else f"a weight of shape {source.shape}"
            raise GraphError(
                f"The traced graph wants {name} of shape {value.shape} and has {found}.",
                "The decoder and the names table disagree: this is a defect, please report it.",
            )
        value.const_value = StreamedTensor(in_format(source, torch.float32), name=name)


def _positions(model: ir.Model) -> int:
    """How many there are: a cache may have fewer slots."""
    shape = model.graph.initializers["rotary_cos"].shape
    assert shape is not None
    rows = shape[0]
    assert isinstance(rows, int)
    return rows


def _name_axes(model: ir.Model) -> None:
    """Gives the dynamic axes of inputs and outputs their names."""
    for value in (*model.graph.inputs, *model.graph.outputs):
        assert value.shape is not None
        dims: list[int | str | ir.SymbolicDim] = ["batch", *value.shape[1:]]
        if value.name in ("input_ids", "position_ids") or not isinstance(value.shape[1], int):
            dims[1] = "tokens"
        value.shape = ir.Shape(dims)


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Silences the exporter's own progress and hints; what fails still raises."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
