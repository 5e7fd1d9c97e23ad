"""onnxruntime's own quantizers on the shipped model: what the schemes of this project are compared with.

    python benchmarks/onnxruntime_quantizer.py [--outliers] [--text FILE] [--only NAME]

The graph is this project's (`--target onnx --precision fp32 --logits all`), prepared as onnxruntime's manual
says: its weights stand in the other layout behind a Transpose, which `quant_pre_process` computes beforehand,
and with that the head becomes a weight of its own beside the table. The table stays in fp32 for the lookup
where a quantizer leaves it so; the sizes are given with it and without it.

Measured like `quantization.py` does, on the same texts and against the same reference.
"""

import argparse
import io
import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from comparison import (
    HEADINGS,
    Comparison,
    cells,
    file_text,
    passages_text,
    print_heading,
    print_row,
    written_text,
)
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_dynamic, quantize_static
from onnxruntime.quantization.matmul_nbits_quantizer import (
    DefaultWeightOnlyQuantConfig,
    GPTQWeightOnlyQuantConfig,
    HQQWeightOnlyQuantConfig,
    KQuantWeightOnlyQuantConfig,
    MatMulNBitsQuantizer,
    RTNWeightOnlyQuantConfig,
)
from onnxruntime.quantization.shape_inference import quant_pre_process
from outliers import plant_outliers

from gemma_export.exporter.config import tiny_folder
from gemma_export.exporter.pipeline import build
from gemma_export.exporter.request import BuildRequest
from gemma_export.exporter.source import open_source
from gemma_export.runtime.bundle import open_bundle
from gemma_export.runtime.onnxruntime import OnnxRuntimeBackend
from gemma_export.runtime.session import Session, load

CALIBRATION_SEED, CALIBRATION_ROWS = 1, 64
"""Of the text that their calibration gets; it is the model's own, too, and none that is measured on."""

Inputs = dict[str, np.ndarray[Any, Any]]


class Reader(CalibrationDataReader):  # type: ignore[misc]
    """Feeds sequences to their calibration, each with an empty cache.

    Args:
        session: Of the graph that is quantized; it says what a cache is.
        sequences: Token ids.
    """

    def __init__(self, session: Session, sequences: Sequence[Sequence[int]]) -> None:
        cache = session.new_cache()
        self._cache: Inputs = {}
        for layer, (key, value) in enumerate(zip(cache.key_buffers, cache.value_buffers, strict=True)):
            self._cache |= {f"past_key_values.{layer}.key": key, f"past_key_values.{layer}.value": value}
        self._sequences = list(sequences)
        self.rewind()

    def get_next(self) -> Inputs | None:
        """The inputs of one more sequence; None after the last."""
        tokens = next(self._left, None)
        if tokens is None:
            return None
        positions = np.arange(len(tokens), dtype=np.int64)
        return {"input_ids": np.array([tokens]), "position_ids": positions[None], **self._cache}

    def rewind(self) -> None:
        """Begins again."""
        self._left: Iterator[Sequence[int]] = iter(self._sequences)

    def __deepcopy__(self, memo: Mapping[int, Any]) -> "Reader":
        # The GPTQ of onnxruntime copies its reader, and an iterator cannot be copied.
        self.rewind()
        return self


@dataclass(frozen=True)
class Prepared:
    """What a quantizer gets.

    Attributes:
        graph: The prepared graph in one file.
        head: The name of the product that makes the logits.
        reader: Text to calibrate with.
    """

    graph: Path
    head: str
    reader: Reader


Quantizer = Callable[[Prepared, Path], None]
"""Quantizes the prepared graph into a file."""


def dynamic(prepared: Prepared, output: Path, **options: Any) -> None:
    """8 bits, activations too: a scale per tensor found at run time."""
    quantize_dynamic(prepared.graph, output, weight_type=QuantType.QInt8, **options)


def static(prepared: Prepared, output: Path, **options: Any) -> None:
    """8 bits, activations too: a scale per tensor found by calibration."""
    prepared.reader.rewind()
    quantize_static(
        str(prepared.graph),
        str(output),
        prepared.reader,
        op_types_to_quantize=["MatMul"],
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        **options,
    )


def blocks(prepared: Prepared, output: Path, *, head_bits: int | None = None, **options: Any) -> None:
    """Rounding to nearest in blocks; with `head_bits` the head gets those, in a second pass."""
    model = onnx.load(prepared.graph)
    excluded = [] if head_bits is None else [prepared.head]
    quantizer = MatMulNBitsQuantizer(
        model, nodes_to_exclude=excluded, algo_config=DefaultWeightOnlyQuantConfig(**options)
    )
    quantizer.process()
    if head_bits is not None:
        rest = DefaultWeightOnlyQuantConfig(**options | {"bits": head_bits})
        quantizer = MatMulNBitsQuantizer(quantizer.model.model, algo_config=rest)
        quantizer.process()
    quantizer.model.save_model_to_file(str(output))


def half_quadratic(prepared: Prepared, output: Path, *, bits: int, block_size: int) -> None:
    """HQQ: zero points are chosen so that few weights are far off."""
    _weight_only(prepared, output, HQQWeightOnlyQuantConfig(block_size, bits), block_size, 4)


def neural_compressor(
    prepared: Prepared, output: Path, *, block_size: int, gptq: bool = False, head_bits: int | None = None
) -> None:
    """`k_quant`, or GPTQ: the algorithms that were taken over from Neural Compressor and llama.cpp."""
    if gptq:
        config = GPTQWeightOnlyQuantConfig(prepared.reader, block_size=block_size)
    else:
        config = KQuantWeightOnlyQuantConfig(
            customized_weight_config=None if head_bits is None else {prepared.head: {"bits": head_bits}}
        )
    _weight_only(prepared, output, config, block_size, 4)


def nearest_compressor(prepared: Prepared, output: Path, *, block_size: int) -> None:
    """Rounding to nearest with a zero point, as Neural Compressor does it."""
    _weight_only(prepared, output, RTNWeightOnlyQuantConfig(), block_size, 4)


def _weight_only(prepared: Prepared, output: Path, config: Any, block_size: int, accuracy_level: int) -> None:
    quantizer = MatMulNBitsQuantizer(
        onnx.load(prepared.graph),
        block_size=block_size,
        accuracy_level=accuracy_level,
        algo_config=config,
    )
    quantizer.process()
    quantizer.model.save_model_to_file(str(output))


def quantizers() -> Iterator[tuple[str, Quantizer]]:
    """Every quantizer with what to call it."""
    yield from _eight_bits()
    for size in (32, 64, 128):
        yield from _four_bits(size)


def _eight_bits() -> Iterator[tuple[str, Quantizer]]:
    dynamic_products = partial(dynamic, op_types_to_quantize=["MatMul"])
    yield "quantize_dynamic", dynamic_products
    yield "quantize_dynamic, per channel", partial(dynamic_products, per_channel=True)
    lookup = partial(dynamic, op_types_to_quantize=["MatMul", "Gather"], per_channel=True)
    yield "quantize_dynamic, per channel, lookup", lookup
    yield "quantize_static", static
    yield "quantize_static, per channel", partial(static, per_channel=True)
    nearest = partial(blocks, bits=8, block_size=128, is_symmetric=True)
    for level in (0, 4):
        yield f"8 bits, blocks of 128, accuracy level {level}", partial(nearest, accuracy_level=level)
    for size in (32, 128, 256):
        zero_points = partial(blocks, bits=8, block_size=size, accuracy_level=4)
        yield f"8 bits with zero points, blocks of {size}", zero_points


def _four_bits(size: int) -> Iterator[tuple[str, Quantizer]]:
    """Products in 4 bits, and the same with the head in 8 as careful users have it."""
    zero_points = partial(blocks, bits=4, block_size=size, accuracy_level=4)
    nearest = partial(zero_points, is_symmetric=True)
    k_quant = partial(neural_compressor, block_size=size)
    for head, bits in (("", None), (", head 8 bits", 8)):
        yield f"4 bits, blocks of {size}{head}", partial(nearest, head_bits=bits)
        yield f"4 bits with zero points, blocks of {size}{head}", partial(zero_points, head_bits=bits)
        yield f"4 bits k_quant, blocks of {size}{head}", partial(k_quant, head_bits=bits)
    # Of 8 bits their lookup cannot be had: it is left in fp32.
    lookup = partial(nearest, head_bits=8, op_types_to_quantize=("MatMul", "Gather"))
    yield f"4 bits, blocks of {size}, head 8 bits, lookup", lookup
    yield f"4 bits RTN, blocks of {size}", partial(nearest_compressor, block_size=size)
    yield f"4 bits HQQ, blocks of {size}", partial(half_quadratic, bits=4, block_size=size)
    yield f"4 bits GPTQ, blocks of {size}", partial(neural_compressor, block_size=size, gptq=True)


def prepare(graph: Path, folder: Path, reader: Reader) -> Prepared:
    """The graph as onnxruntime's quantizers want it: constants in place of transposed weights, one file."""
    whole, prepared = folder / "whole.onnx", folder / "prepared.onnx"
    # Their preparation does not find external data again.
    onnx.save(onnx.load(graph), whole)
    # Symbolic shapes are asked of a script that does not know the operators of opset 24.
    quant_pre_process(whole, prepared, skip_symbolic_shape=True)
    nodes = onnx.load(prepared, load_external_data=False).graph.node
    head = next(node.name for node in nodes if "logits" in node.output)
    return Prepared(prepared, head, reader)


def lookup_bytes(model: onnx.ModelProto) -> int:
    """Bytes of the weights that are only looked up."""
    readers: dict[str, set[str]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, set()).add(node.op_type)
    lookups = {"Gather", "GatherBlockQuantized"}
    return sum(
        len(tensor.raw_data)
        for tensor in model.graph.initializer
        if readers.get(tensor.name) and readers[tensor.name] <= lookups
    )


def main() -> None:
    """Measures every quantizer that the arguments name."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--outliers", action="store_true", help="with planted outlier channels")
    parser.add_argument("--text", type=Path, help="a text file to measure on as well")
    parser.add_argument("--only", default="", help="those whose name has this in it")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    onnxruntime.set_default_logger_severity(4)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        checkpoint = tiny_folder()
        if arguments.outliers:
            checkpoint = plant_outliers(checkpoint, folder / "checkpoint")
        bundle = folder / "bundle"
        build(BuildRequest(output=bundle, checkpoint=checkpoint, target="onnx", logits="all", parity="none"))
        session = load(bundle, threads=1)
        texts = [written_text(session), passages_text(session.tokenizer, session.max_length)]
        if arguments.text is not None:
            texts.append(file_text(session.tokenizer, arguments.text, session.max_length))
        comparison = Comparison(open_source(checkpoint), texts)
        reader = Reader(session, written_text(session, CALIBRATION_SEED, CALIBRATION_ROWS).sequences)
        prepared = prepare(bundle / "model.onnx", folder, reader)
        opened = open_bundle(bundle)
        print_heading("quantizer", "MB", "MB without the lookup", *HEADINGS)
        for name, quantizer in quantizers():
            if arguments.only not in name:
                continue
            output = folder / "quantized.onnx"
            try:
                with redirect_stdout(io.StringIO()):  # Some of them print how far they are.
                    quantizer(prepared, output)
                size = output.stat().st_size
                model = onnx.load(output)
                quantized = Session(opened, OnnxRuntimeBackend(opened, threads=1, graph=output.read_bytes()))
            except Exception as error:  # Whatever their tools raise is a result.
                print_row(name, f"{type(error).__name__}: {str(error).splitlines()[0][:100]}")
                continue
            megabytes = f"{size / 1e6:.2f}", f"{(size - lookup_bytes(model)) / 1e6:.2f}"
            for text, figures in comparison.figures(quantized):
                print_row(name, *megabytes, *cells(text, figures))


if __name__ == "__main__":
    main()
