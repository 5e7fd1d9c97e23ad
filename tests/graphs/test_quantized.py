"""Weights that are quantized while they are read: any order of reading, every layout, on the disk and off."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from support.nibbles import unpack_nibbles
from torch import Tensor

from gemma_export.errors import CheckpointError, GraphError
from gemma_export.graphs import quantized as module
from gemma_export.graphs.formats import Rounding, WeightFormat
from gemma_export.graphs.quantization import (
    LinearQuantization,
    encode,
    pack_nibbles,
    scales_for,
)
from gemma_export.graphs.quantized import (
    GroupScales,
    PackedBlocks,
    PackedRows,
    QuantizedWeight,
    RowScales,
    TransposedCodes,
    in_slices,
    quantized,
)
from gemma_export.graphs.storage import GRAPH_FILE, external_bytes, write_model
from gemma_export.graphs.tensors import (
    Cast,
    ConcatRows,
    InMemory,
    RowSource,
    ScaleColumns,
    ScaleRows,
    StreamedTensor,
    add_initializer,
)

pytestmark = pytest.mark.usefixtures("one_thread")

ROWS, COLUMNS = 50, 64
WEIGHT = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0))
PER_ROW, BLOCKS, NIBBLES = WeightFormat(8), WeightFormat(8, 16), WeightFormat(4, 32, negative_scales=True)
every_format = pytest.mark.parametrize("form", [PER_ROW, BLOCKS, NIBBLES], ids=["rows", "blocks", "nibbles"])
every_rounding = pytest.mark.parametrize("rounding", ["nearest", "mse"])


class Counting(InMemory):
    """Remembers how many rows were read of it."""

    rows = 0

    def read(self, start: int, stop: int) -> Tensor:
        object.__setattr__(self, "rows", self.rows + stop - start)
        return super().read(start, stop)


@pytest.fixture(autouse=True)
def small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several slices to a block, on several threads, as a weight of a real size has them."""
    monkeypatch.setattr(module, "SLICE_VALUES", 3 * COLUMNS)
    monkeypatch.setattr(module, "WORKERS", 3)


def weight_of(
    form: WeightFormat, rounding: Rounding = "nearest", source: RowSource | None = None
) -> QuantizedWeight:
    return quantized(source or InMemory("w", WEIGHT), LinearQuantization("w8", form, rounding))


def whole(source: RowSource, step: int = 7) -> Tensor:
    """Everything, read in steps as the writer does."""
    rows = source.shape[0]
    return torch.cat([source.read(start, min(start + step, rows)) for start in range(0, rows, step)])


def expected_parts(form: WeightFormat, rounding: Rounding) -> tuple[Tensor, Tensor]:
    scales = scales_for(WEIGHT, form, rounding)
    return encode(WEIGHT, scales, form), scales


@every_format
@every_rounding
@pytest.mark.parametrize("first", ["codes", "scales"])
@pytest.mark.parametrize("step", [1, 7, 49, ROWS], ids=lambda step: f"{step} rows")
def test_parts_are_the_same_in_any_order_and_any_steps(
    form: WeightFormat, rounding: Rounding, first: str, step: int
) -> None:
    weight = weight_of(form, rounding)
    codes, scales = expected_parts(form, rounding)
    reads = [(weight.codes, codes), (weight.scales, scales)]
    for part, expected in reads if first == "codes" else reads[::-1]:
        assert (part.name, part.shape, part.dtype) == ("w", tuple(expected.shape), expected.dtype)
        assert torch.equal(whole(part, step), expected)


def test_codes_and_then_scales_take_one_reading() -> None:
    source = Counting("w", WEIGHT)
    weight = weight_of(PER_ROW, source=source)
    whole(weight.codes)
    whole(weight.scales)
    assert source.rows == ROWS


def test_scales_and_then_codes_take_two_readings_and_one_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = 0

    def count(rows: Tensor, form: WeightFormat, rounding: Rounding) -> Tensor:
        nonlocal chosen
        chosen += len(rows)
        return scales_for(rows, form, rounding)

    monkeypatch.setattr(module, "scales_for", count)
    source = Counting("w", WEIGHT)
    weight = weight_of(BLOCKS, "mse", source)
    whole(weight.scales)
    whole(weight.codes)
    assert (source.rows, chosen) == (2 * ROWS, ROWS)


def test_scales_are_let_go_once_both_parts_are_read_and_can_be_read_again() -> None:
    source = Counting("w", WEIGHT)
    weight = weight_of(PER_ROW, source=source)
    for reading in (1, 2):
        codes, scales = whole(weight.codes), whole(weight.scales)
        assert source.rows == reading * ROWS
        assert torch.equal(codes, expected_parts(PER_ROW, "nearest")[0])
        assert torch.equal(scales, expected_parts(PER_ROW, "nearest")[1])


@every_format
def test_a_merged_weight_of_16_bits_with_scaled_channels(form: WeightFormat) -> None:
    halves = [InMemory(name, WEIGHT.bfloat16()) for name in "ab"]
    merged = ConcatRows(tuple(Cast(half, torch.float32) for half in halves))
    columns = torch.linspace(0.1, 10, COLUMNS)
    rows = torch.linspace(10, 0.1, 2 * ROWS)
    weight = weight_of(form, source=ScaleRows(ScaleColumns(merged, columns), rows))
    numbers = torch.cat([WEIGHT, WEIGHT]).bfloat16().float() * columns * rows[:, None]
    scales = scales_for(numbers, form, "nearest")
    assert torch.equal(whole(weight.codes), encode(numbers, scales, form))
    assert torch.equal(whole(weight.scales), scales)
    assert weight.codes.name == "a + b"


def test_packed_blocks_of_8_bits_have_their_zero_at_128() -> None:
    packed = PackedBlocks(weight_of(BLOCKS))
    codes, _ = expected_parts(BLOCKS, "nearest")
    assert (packed.shape, packed.dtype) == ((ROWS, 4, 16), torch.uint8)
    assert torch.equal(whole(packed).int(), codes.reshape(ROWS, 4, 16).int() + 128)


def test_packed_blocks_of_4_bits_have_their_zero_at_8_in_each_half() -> None:
    packed = PackedBlocks(weight_of(NIBBLES))
    codes, _ = expected_parts(NIBBLES, "nearest")
    assert packed.shape == (ROWS, 2, 16)
    found = whole(packed).reshape(ROWS, -1)
    assert torch.equal((found & 0xF).int(), codes[:, 0::2].int() + 8)
    assert torch.equal((found >> 4).int(), codes[:, 1::2].int() + 8)


def test_packed_rows_are_the_nibbles_of_onnx() -> None:
    packed = PackedRows(weight_of(NIBBLES))
    codes, _ = expected_parts(NIBBLES, "nearest")
    assert packed.shape == (ROWS, COLUMNS // 2)
    assert torch.equal(unpack_nibbles(whole(packed)), codes)


def test_transposed_codes_are_held_from_the_first_row_to_the_last() -> None:
    source = Counting("w", WEIGHT)
    weight = weight_of(PER_ROW, source=source)
    transposed, scales = TransposedCodes(weight), RowScales(weight)
    codes, expected_scales = expected_parts(PER_ROW, "nearest")
    assert (transposed.shape, scales.shape) == ((COLUMNS, ROWS), (ROWS,))
    assert torch.equal(whole(transposed), codes.T)
    assert transposed._held is None
    assert torch.equal(whole(scales), expected_scales[:, 0])
    assert source.rows == ROWS
    assert torch.equal(whole(transposed), codes.T)


def test_stored_codes_are_taken_as_they_are() -> None:
    codes = torch.randint(-128, 128, (ROWS, COLUMNS), dtype=torch.int8)
    scales = (torch.rand(ROWS, 4) + 0.5).bfloat16().float()
    stored = (InMemory("w", codes), InMemory("w", scales))
    weight = quantized(InMemory("w", WEIGHT), LinearQuantization("w8", BLOCKS, stored=stored))
    assert torch.equal(whole(weight.codes), codes)
    assert torch.equal(whole(weight.scales), scales)
    assert torch.equal(whole(PackedBlocks(weight)).int() - 128, codes.reshape(ROWS, 4, 16).int())
    assert torch.equal(whole(GroupScales(weight)).float(), scales)


def test_stored_scales_are_not_rounded_behind_their_codes() -> None:
    codes, scales = torch.zeros(ROWS, COLUMNS, dtype=torch.int8), torch.ones(ROWS, 4)
    scales[30, 2] += 2**-8
    stored = (InMemory("w", codes), InMemory("w", scales))
    short = GroupScales(quantized(InMemory("w", WEIGHT), LinearQuantization("w8", BLOCKS, stored=stored)))
    assert torch.equal(short.read(0, 30).float(), scales[:30])
    with pytest.raises(GraphError, match="scales of w have more digits than 16 bits hold"):
        whole(short)


@pytest.mark.parametrize("form", [BLOCKS, NIBBLES], ids=["blocks", "nibbles"])
@every_rounding
def test_scales_of_blocks_are_stored_in_16_bits(form: WeightFormat, rounding: Rounding) -> None:
    weight = weight_of(form, rounding)
    stored = GroupScales(weight)
    codes, scales = expected_parts(form, rounding)
    assert (stored.name, stored.shape, stored.dtype) == ("w", tuple(scales.shape), torch.bfloat16)
    assert torch.equal(whole(weight.codes), codes)
    assert torch.equal(whole(stored).float(), scales)


@pytest.mark.parametrize(
    ("codes", "scales"),
    [((ROWS, 32), (ROWS, 4)), ((ROWS, COLUMNS), (ROWS, 1)), ((COLUMNS, ROWS), (ROWS, 4))],
    ids=["narrow codes", "scales of other blocks", "transposed codes"],
)
def test_stored_codes_of_another_shape_are_refused(codes: tuple[int, int], scales: tuple[int, int]) -> None:
    stored = (InMemory("w", torch.zeros(codes, dtype=torch.int8)), InMemory("w", torch.ones(scales)))
    with pytest.raises(
        GraphError, match=r"stored codes of w .* the weight needs int8 \[50, 64\] with \[50, 4\]"
    ):
        quantized(InMemory("w", WEIGHT), LinearQuantization("w8", BLOCKS, stored=stored))


def test_stored_numbers_are_no_codes() -> None:
    stored = (InMemory("w", WEIGHT), InMemory("w", torch.ones(ROWS, 4)))
    with pytest.raises(GraphError, match="float32"):
        quantized(InMemory("w", WEIGHT), LinearQuantization("w8", BLOCKS, stored=stored))


def test_blocks_that_do_not_divide_the_rows_are_refused() -> None:
    with pytest.raises(GraphError, match="w cannot be quantized: blocks of 48 do not divide rows of 64"):
        weight_of(WeightFormat(8, 48))


@every_format
@every_rounding
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf], ids=["nan", "inf", "-inf"])
@pytest.mark.parametrize("part", ["codes", "scales"])
def test_a_weight_that_is_no_number_is_named(
    form: WeightFormat, rounding: Rounding, bad: float, part: str
) -> None:
    values = WEIGHT.clone()
    values[33, 5] = bad
    weight = weight_of(form, rounding, InMemory("model.layers.0.weight", values))
    with pytest.raises(CheckpointError, match=r"The weight model.layers.0.weight holds NaN or infinity"):
        whole(getattr(weight, part))


@pytest.mark.parametrize("layout", [TransposedCodes, PackedBlocks], ids=lambda layout: layout.__name__)
def test_codes_of_a_weight_that_is_no_number_are_not_written(layout: type, tmp_path: Path) -> None:
    values = WEIGHT.clone()
    values[-1, -1] = torch.nan
    graph = ir.Graph([], [], nodes=[], opset_imports={"": 24}, name="weights")
    add_initializer(graph, "codes", layout(weight_of(PER_ROW, source=InMemory("w", values))))
    with pytest.raises(CheckpointError, match="The weight w holds NaN or infinity"):
        write_model(ir.Model(graph, ir_version=11), tmp_path)


def test_every_layout_comes_back_from_the_disk(tmp_path: Path) -> None:
    graph = ir.Graph([], [], nodes=[], opset_imports={"": 24}, name="weights")
    per_row, blocks, nibbles = weight_of(PER_ROW), weight_of(BLOCKS), weight_of(NIBBLES)
    add_initializer(graph, "transposed", TransposedCodes(per_row))
    add_initializer(graph, "row scales", RowScales(per_row))
    add_initializer(graph, "blocks", PackedBlocks(blocks))
    add_initializer(graph, "block scales", GroupScales(blocks))
    add_initializer(graph, "int4", PackedRows(nibbles), ir.DataType.INT4)
    model = ir.Model(graph, ir_version=11)
    size = external_bytes(model)
    files = write_model(model, tmp_path)
    assert {file.stat().st_size for file in tmp_path.iterdir()} == {file.size for file in files.values()}
    assert size == sum(file.size for name, file in files.items() if name != GRAPH_FILE)
    stored = {
        name: value.const_value for name, value in ir.load(tmp_path / GRAPH_FILE).graph.initializers.items()
    }
    formats = {name: (tensor.dtype.name, tuple(tensor.shape)) for name, tensor in stored.items()}
    assert formats == {
        "transposed": ("INT8", (COLUMNS, ROWS)),
        "row scales": ("FLOAT", (ROWS,)),
        "blocks": ("UINT8", (ROWS, 4, 16)),
        "block scales": ("BFLOAT16", (ROWS, 4)),
        "int4": ("INT4", (ROWS, COLUMNS)),
    }
    codes, scales = expected_parts(PER_ROW, "nearest")
    np.testing.assert_array_equal(stored["transposed"].numpy(), codes.T)
    np.testing.assert_array_equal(stored["row scales"].numpy(), scales[:, 0])
    codes, scales = expected_parts(BLOCKS, "nearest")
    np.testing.assert_array_equal(stored["blocks"].numpy().reshape(ROWS, COLUMNS), codes.int() + 128)
    np.testing.assert_array_equal(stored["block scales"].numpy().astype(np.float32), scales)
    codes, _ = expected_parts(NIBBLES, "nearest")
    np.testing.assert_array_equal(stored["int4"].numpy().astype(np.int8), codes)


def test_a_small_int4_tensor_can_be_asked_for_whole() -> None:
    codes = torch.tensor([[1, -8, 7, 0]], dtype=torch.int8)
    tensor = StreamedTensor(InMemory("w", pack_nibbles(codes)), dtype=ir.DataType.INT4)
    assert tensor.nbytes == 2
    np.testing.assert_array_equal(tensor.numpy().astype(np.int8), codes)


def test_slices_cover_everything_once() -> None:
    seen: list[tuple[int, int]] = []
    in_slices(lambda low, high: seen.append((low, high)), 5, 18, 4)
    assert sorted(seen) == [(5, 9), (9, 13), (13, 17), (17, 18)]


def test_an_error_in_one_slice_arrives() -> None:
    def fail(low: int, high: int) -> None:
        if low == 8:
            raise CheckpointError("The file was changed.", "Try again.")

    with pytest.raises(CheckpointError, match="was changed"):
        in_slices(fail, 0, 20, 4)
