"""A lookup and a product in rows give what they give whole, number by number."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from support.graphs import from_text, run

from gemma_export.graphs.passes.rows_at_a_time import rows_at_a_time

ROWS, WIDTH = 37, 8
RNG = np.random.default_rng(0)
FEEDS = {
    "ids": np.array([[0, 5, ROWS - 1, 5]]),
    "x": RNG.standard_normal((1, 4, WIDTH)).astype(np.float32),
}
NUMBERS = RNG.standard_normal((ROWS, WIDTH)).astype(np.float16)
CODES = RNG.integers(-127, 128, (ROWS, WIDTH)).astype(np.int8)
STEP = np.array([0.01], np.float32)
STEPS = RNG.random((ROWS, 2), np.float32)

TABLES = {
    # What makes numbers of what is stored.
    "cast": ("numbers = Cast<to = 1>(table)", {"table": NUMBERS}),
    "rounded": (
        "wide = Cast<to = 1>(table) narrow = Cast<to = 16>(wide) numbers = Cast<to = 1>(narrow)",
        {"table": NUMBERS},
    ),
    "codes": ("numbers = DequantizeLinear(table, step)", {"table": CODES, "step": STEP}),
    "codes, rounded, of a step in 16 bits": (
        """wide_step = Cast<to = 1>(step)
           wide = DequantizeLinear(table, wide_step)
           narrow = Cast<to = 10>(wide)
           numbers = Cast<to = 1>(narrow)""",
        {"table": CODES, "step": STEP.astype(np.float16)},
    ),
}
BLOCKS = {
    "blocks": (
        "numbers = DequantizeLinear<axis = 1, block_size = 4>(table, step)",
        {"table": CODES, "step": STEPS},
    ),
    "blocks, rounded, of steps in 16 bits": (
        """wide_steps = Cast<to = 1>(step)
           wide = DequantizeLinear<axis = 1, block_size = 4>(table, wide_steps)
           narrow = Cast<to = 10>(wide)
           numbers = Cast<to = 1>(narrow)""",
        {"table": CODES, "step": STEPS.astype(np.float16)},
    ),
}
LEFT_ALONE = {
    "a scale per row": (
        "numbers = DequantizeLinear<axis = 0>(table, step)",
        {"table": CODES, "step": STEPS[:, 0]},
    ),
    "another operator": ("numbers = Abs(table)", {"table": NUMBERS.astype(np.float32)}),
}


AS_STORED = "rows = Gather(numbers, ids)"
AS_THE_HEAD_READS_IT = """columns = Gather<axis = 1>(turned, ids)
            rows = Transpose<perm = [1, 2, 0]>(columns)"""
LOOKUPS = pytest.mark.parametrize(
    "lookup", [AS_STORED, AS_THE_HEAD_READS_IT], ids=["as stored", "as the head reads"]
)


def tied(folder: Path, chain: str, stored: dict[str, np.ndarray], lookup: str = AS_STORED) -> ir.Model:
    """A lookup and a head over one table, which lies in a file."""
    types = {"float16": "float16", "float32": "float", "int8": "int8"}
    inputs = ", ".join(
        f"{types[a.dtype.name]}[{', '.join(map(str, a.shape))}] {name}" for name, a in stored.items()
    )
    model = from_text(
        f"""tied (int64[1, 4] ids, float[1, 4, {WIDTH}] x, {inputs})
            => (float[1, 4, {WIDTH}] rows, float[1, 4, {ROWS}] y)
        {{
            {chain}
            turned = Transpose<perm = [1, 0]>(numbers)
            {lookup}
            y = MatMul(x, turned)
        }}""",
        **stored,
    )
    ir.save(model, folder / "model.onnx", external_data="weights", size_threshold_bytes=0)
    return ir.load(folder / "model.onnx")


def parts(model: ir.Model) -> list[int]:
    """Rows of each part of the table that is multiplied by itself."""
    names = [name for name in model.graph.initializers if name.startswith("table.")]
    return [model.graph.initializers[name].shape[0] for name in names]


@LOOKUPS
@pytest.mark.parametrize("name", TABLES)
def test_rows_give_what_the_whole_gives(tmp_path: Path, name: str, lookup: str) -> None:
    model = tied(tmp_path, *TABLES[name], lookup)
    whole = run(model, FEEDS, tmp_path)
    assert rows_at_a_time(model, most=10 * WIDTH) == 2
    assert parts(model) == [10, 10, 10, 7]
    assert model.graph.outputs[1].producer().op_type == "Concat"
    gather = next(node for node in model.graph if node.op_type == "Gather")
    assert gather.inputs[0] is model.graph.initializers["table"]
    for output, values in run(model, FEEDS, tmp_path).items():
        np.testing.assert_array_equal(values, whole[output])


@LOOKUPS
@pytest.mark.parametrize("name", BLOCKS)
def test_scales_of_blocks_are_taken_in_the_same_rows(tmp_path: Path, name: str, lookup: str) -> None:
    """A lookup would have to look them up too: it stays as it is."""
    model = tied(tmp_path, *BLOCKS[name], lookup)
    whole = run(model, FEEDS, tmp_path)
    assert rows_at_a_time(model, most=10 * WIDTH) == 1
    assert parts(model) == [10, 10, 10, 7]
    for output, values in run(model, FEEDS, tmp_path).items():
        np.testing.assert_array_equal(values, whole[output])


def test_a_product_that_is_small_enough_stays_whole(tmp_path: Path) -> None:
    model = tied(tmp_path, *TABLES["cast"])
    assert rows_at_a_time(model, most=ROWS * WIDTH) == 1
    assert parts(model) == []


@LOOKUPS
@pytest.mark.parametrize("name", LEFT_ALONE)
def test_what_is_made_otherwise_is_left_alone(tmp_path: Path, name: str, lookup: str) -> None:
    model = tied(tmp_path, *LEFT_ALONE[name], lookup)
    before = ir.to_proto(model).SerializeToString()
    assert rows_at_a_time(model, most=10 * WIDTH) == 0
    assert ir.to_proto(model).SerializeToString() == before
