"""A product reads what was transposed for it, whatever made that."""

import numpy as np
import onnx_ir as ir
from support.graphs import from_text, run

from gemma_export.graphs.passes.fuse_transposes import fuse_transposes
from gemma_export.graphs.passes.remove_dead_code import remove_dead_code

RNG = np.random.default_rng(0)
FEEDS = {"x": RNG.standard_normal((1, 3, 8)).astype(np.float32)}
WEIGHT = RNG.standard_normal((5, 8)).astype(np.float16)


def product(perm: str, weight: np.ndarray) -> ir.Model:
    height, width = weight.shape
    return from_text(
        f"""product (float[1, 3, 8] x, float16[{height}, {width}] w) => (float[1, 3, 5] y)
        {{
            wide = Cast<to = 1>(w)
            turned = Transpose<perm = [{perm}]>(wide)
            y = MatMul(x, turned)
        }}""",
        w=weight,
    )


def test_a_weight_that_is_converted_in_every_step_is_not_transposed() -> None:
    model = product("1, 0", WEIGHT)
    before = run(model, FEEDS)
    assert fuse_transposes(model) == 1
    remove_dead_code(model)
    assert [node.op_type for node in model.graph] == ["Cast", "FusedMatMul"]
    # Eight products added in another order, each near 1.
    np.testing.assert_allclose(run(model, FEEDS)["y"], before["y"], atol=1e-6)


def test_a_transpose_that_turns_nothing_is_left_alone() -> None:
    model = product("0, 1", WEIGHT.T)
    assert fuse_transposes(model) == 0
    assert [node.op_type for node in model.graph] == ["Cast", "Transpose", "MatMul"]
