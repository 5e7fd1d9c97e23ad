"""A lookup and a product in rows give what they give whole, number by number."""

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
LEFT_ALONE = {
    "a scale per block": (
        "numbers = DequantizeLinear<axis = 1, block_size = 4>(table, step)",
        {"table": CODES, "step": STEPS},
    ),
    "another operator": ("numbers = Abs(table)", {"table": NUMBERS.astype(np.float32)}),
}


AS_STORED = "rows = Gather(numbers, ids)"
AS_THE_HEAD_READS_IT = """columns = Gather<axis = 1>(turned, ids)
            rows = Transpose<perm = [1, 2, 0]>(columns)"""


def tied(chain: str, stored: dict[str, np.ndarray], lookup: str = AS_STORED) -> ir.Model:
    """A lookup and a head over one stored table."""
    types = {"float16": "float16", "float32": "float", "int8": "int8"}
    inputs = ", ".join(
        f"{types[a.dtype.name]}[{', '.join(map(str, a.shape))}] {name}" for name, a in stored.items()
    )
    return from_text(
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


def shapes(model: ir.Model) -> list[int]:
    """Rows of each block that is cut from the table."""
    return [int(node.outputs[0].shape[0]) for node in model.graph if node.op_type == "Slice"]


@pytest.mark.parametrize("lookup", [AS_STORED, AS_THE_HEAD_READS_IT], ids=["as stored", "as the head reads"])
@pytest.mark.parametrize("name", TABLES)
def test_rows_give_what_the_whole_gives(name: str, lookup: str) -> None:
    model = tied(*TABLES[name], lookup)
    whole = run(model, FEEDS)
    assert rows_at_a_time(model, most=10 * WIDTH) == 2
    assert shapes(model) == [10, 10, 10, 7]
    assert model.graph.outputs[1].producer().op_type == "Concat"
    gather = next(node for node in model.graph if node.op_type == "Gather")
    assert gather.inputs[0] is model.graph.initializers["table"]
    for output, values in run(model, FEEDS).items():
        np.testing.assert_array_equal(values, whole[output])


def test_a_product_that_is_small_enough_stays_whole() -> None:
    model = tied(*TABLES["cast"])
    assert rows_at_a_time(model, most=ROWS * WIDTH) == 1
    assert shapes(model) == []


@pytest.mark.parametrize("lookup", [AS_STORED, AS_THE_HEAD_READS_IT], ids=["as stored", "as the head reads"])
@pytest.mark.parametrize("name", LEFT_ALONE)
def test_what_is_made_otherwise_is_left_alone(name: str, lookup: str) -> None:
    model = tied(*LEFT_ALONE[name], lookup)
    before = ir.to_proto(model).SerializeToString()
    assert rows_at_a_time(model, most=10 * WIDTH) == 0
    assert ir.to_proto(model).SerializeToString() == before
