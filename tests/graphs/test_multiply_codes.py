"""A product of codes, and their step before it, gives what the product of numbers gives, number by number."""

import numpy as np
import onnx_ir as ir
import pytest
from support.graphs import from_text, run

from gemma_export.graphs.passes.multiply_codes import multiply_codes

ROWS, WIDTH = 37, 8
RNG = np.random.default_rng(0)
CODES = RNG.integers(-127, 128, (ROWS, WIDTH)).astype(np.int8)
X = RNG.standard_normal((1, 4, WIDTH)).astype(np.float32)

AS_THEY_ARE = "numbers = DequantizeLinear(codes, step)"
# 10 is fp16 and 16 bfloat16 (onnx.TensorProto.DataType).
ROUNDED = """wide = DequantizeLinear(codes, step)
             narrow = Cast<to = DTYPE>(wide)
             numbers = Cast<to = 1>(narrow)"""
STEP_IN_FP16 = """wide_step = Cast<to = 1>(step)
                  numbers = DequantizeLinear(codes, wide_step)"""


def product(chain: str, step: np.ndarray, dtype: int = 10) -> ir.Model:
    """A product with a stored matrix, which a lookup reads too."""
    types = {"float16": "float16", "float32": "float"}
    sizes = ", ".join(map(str, step.shape))
    return from_text(
        f"""product (float[1, 4, {WIDTH}] x, int64[1, 2] ids, int8[{ROWS}, {WIDTH}] codes,
                     {types[step.dtype.name]}[{sizes}] step)
            => (float[1, 4, {ROWS}] y, float[1, 2, {WIDTH}] rows)
        <float[1] wide_step>
        {{
            {chain.replace("DTYPE", str(dtype))}
            turned = Transpose<perm = [1, 0]>(numbers)
            y = MatMul(x, turned)
            rows = Gather(numbers, ids)
        }}""",
        codes=CODES,
        step=step,
    )


@pytest.mark.parametrize("dtype", [10, 16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("chain", [AS_THEY_ARE, ROUNDED, STEP_IN_FP16], ids=["plain", "rounded", "step"])
@pytest.mark.parametrize("step", [2.0**-14, 2.0**-24, 2.0**8])
def test_no_number_changes(chain: str, step: float, dtype: int) -> None:
    size = np.array([step], np.float16 if chain is STEP_IN_FP16 else np.float32)
    model = product(chain, size, dtype)
    feeds = {"x": X, "ids": np.array([[0, ROWS - 1]])}
    before = run(model, feeds)
    assert multiply_codes(model) == 1
    cast = next(node for node in model.graph if node.op_type == "MatMul").inputs[1].producer().inputs[0]
    assert cast.producer().op_type == "Cast"
    assert cast.producer().inputs[0] is model.graph.initializers["codes"]
    assert multiply_codes(model) == 0
    for name, values in run(model, feeds).items():
        np.testing.assert_array_equal(values, before[name])


@pytest.mark.parametrize(
    "step",
    [
        np.array([0.01], np.float32),
        np.array([2.0**-25], np.float32),
        np.array([2.0**9], np.float32),
        np.array([-(2.0**-14)], np.float32),
        np.full(ROWS, 2.0**-14, np.float32),
    ],
    ids=["no power of two", "too small", "too large", "negative", "a step per row"],
)
def test_a_step_that_rounds_is_left_alone(step: np.ndarray) -> None:
    chain = ROUNDED if step.size == 1 else ROUNDED.replace("DequantizeLinear", "DequantizeLinear<axis = 0>")
    model = product(chain, step)
    before = ir.to_proto(model).SerializeToString()
    assert multiply_codes(model) == 0
    assert ir.to_proto(model).SerializeToString() == before
