"""Every set of kernels computes the same numbers: those that the definition says, whatever the threads."""

from typing import Literal

import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from support.matmul_nbits import BLOCKS, BUILT_IN, Floats, Product, available, multiply, session

KERNELS = available()
pytestmark = pytest.mark.skipif(not KERNELS, reason="the kernels are not compiled here")

ROUNDING = 2**-23
"""A step of fp32. Where ours round a product and a sum once, numpy rounds a sum of fp64: that can be a step
aside for each of a handful of blocks, and a step of the largest sum there can be, since terms cancel."""

products = st.builds(
    Product,
    rows=st.integers(1, 140),
    blocks=st.integers(1, 9),
    block=st.sampled_from(BLOCKS),
    bits=st.sampled_from((4, 8)),
    seed=st.integers(0, 99),
    kind=st.sampled_from(("any", "bfloat16", "row")),
)


def activations(product: Product, tokens: int, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).standard_normal((tokens, product.columns)).astype(np.float32)


def check(product: Product, x: Floats) -> None:
    expected = product.expected(x)
    largest = np.abs(x).max() * product.columns * 128 * np.abs(product.scales).max()
    for name in KERNELS:
        found = multiply(product, x, name)
        np.testing.assert_allclose(found, expected, rtol=0, atol=4 * ROUNDING * float(largest), err_msg=name)
        # The paths round alike, so there is nothing to allow for between them.
        np.testing.assert_array_equal(found, multiply(product, x, KERNELS[0]), err_msg=name)


@settings(max_examples=60, deadline=None)
@given(products, st.integers(1, 70), st.integers(0, 99))
def test_numbers_are_those_of_the_definition(product: Product, tokens: int, seed: int) -> None:
    check(product, activations(product, tokens, seed))


@pytest.mark.parametrize("kind", ["any", "bfloat16", "row"])
@pytest.mark.parametrize("bits", [4, 8])
def test_scales_in_fewer_bytes_are_the_same_numbers(
    bits: int, kind: Literal["any", "bfloat16", "row"]
) -> None:
    """Blocks are taken by fours, and what is left of a row one by one."""
    product = Product(rows=37, blocks=11, block=128, bits=bits, kind=kind)
    for tokens in (1, 7):
        check(product, activations(product, tokens))


@pytest.mark.parametrize("name", KERNELS)
def test_scales_that_may_change(name: str) -> None:
    """Where they are no constants, nothing is known of them beforehand."""
    product = Product(rows=9, blocks=5, block=128, bits=8, kind="row")
    graph = product.graph()
    constant = graph.graph.initializer.pop()
    assert constant.name == "scales"
    graph.graph.input.append(helper.make_tensor_value_info("scales", TensorProto.FLOAT, None))
    running, x = session(graph, name), activations(product, 2)
    for factor in (1, 2, -4):
        scales = product.scales * np.float32(factor)
        scales[3, 2] *= 2
        (found,) = running.run(None, {"x": x, "scales": scales})
        fixed = Product(rows=9, blocks=5, block=128, bits=8, kind="row")
        fixed.scales[:] = scales
        np.testing.assert_array_equal(found, multiply(fixed, x, name))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("tokens", [1, 40])
def test_extremes(bits: int, tokens: int) -> None:
    product = Product(rows=20, blocks=6, block=32, bits=bits)
    x = activations(product, tokens)
    x[:, :32] = 0
    x[:, 32:64] *= 1e-39  # Subnormal: without a finite inverse.
    x[:, 64] = 1e6  # An outlier takes all of its block's codes.
    x[:, 96:128] *= np.float32(1e-30)
    x[:, 128:160] = np.where(x[:, 128:160] > 0, 3.0, -3.0)  # Only the outermost codes.
    check(product, x)


def test_the_outermost_codes_do_not_saturate() -> None:
    """Some processors add products of bytes in pairs, and 255 · 127 twice is more than 16 bits hold."""
    product = Product(rows=3, blocks=2, block=256, bits=8)
    product.codes[:] = np.array([255, 0, 255], np.uint8)[:, None]
    x = np.ones((1, 512), np.float32)
    x[:, 256:] = -1
    check(product, x)
    product.scales[:] = 1
    for name in KERNELS:
        found = multiply(product, np.ones((1, 512), np.float32), name)
        # A code of 1.0 is 127 and its scale 1 / 127, so what is left is the rounding of that scale.
        np.testing.assert_allclose(found, [[127 * 512, -128 * 512, 127 * 512]], rtol=4 * ROUNDING)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("block", [16, 32])
def test_rows_of_many_small_blocks(block: int, bits: int) -> None:
    """Longer than the stretch of a row that kernels keep, and not a multiple of it."""
    product = Product(rows=6, blocks=301, block=block, bits=bits)
    check(product, activations(product, 3))


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("tokens", [1, 5, 45])
def test_numbers_do_not_depend_on_the_threads(name: str, tokens: int) -> None:
    # Many pieces of work: 64 KiB of codes, or rows of a sixteenth of the weight.
    product = Product(rows=3333, blocks=8, block=64, bits=8)
    x = activations(product, tokens)
    alone = multiply(product, x, name)
    for threads in (2, 4, 7):
        np.testing.assert_array_equal(multiply(product, x, name, threads), alone)


@pytest.mark.parametrize("name", KERNELS)
def test_a_token_does_not_depend_on_the_others(name: str) -> None:
    product = Product(rows=50, blocks=3, block=64, bits=4)
    x = activations(product, 70)
    together = multiply(product, x, name)
    for count in (1, 2, 3, 4, 5, 8, 9, 33):
        np.testing.assert_array_equal(multiply(product, x[:count], name), together[:count])


@pytest.mark.parametrize("name", KERNELS)
def test_more_tokens_than_are_taken_at_once(name: str) -> None:
    product = Product(rows=17, blocks=2, block=32, bits=4)
    x = activations(product, 700)
    found = multiply(product, x, name)
    np.testing.assert_array_equal(found[650:], multiply(product, x[650:], name))
    np.testing.assert_array_equal(found[:50], multiply(product, x[:50], name))


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("tokens", [1, 20])
@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_what_is_no_number_is_not_hidden(name: str, tokens: int, bad: float) -> None:
    product = Product(rows=7, blocks=2, block=64, bits=8)
    x = activations(product, tokens)
    x[0, 3] = bad
    found = multiply(product, x, name)
    assert np.isnan(found[0]).all()
    assert np.isfinite(found[1:]).all()


@pytest.mark.parametrize("name", KERNELS)
def test_leading_dimensions_are_kept(name: str) -> None:
    product = Product(rows=9, blocks=2, block=16, bits=8)
    x = activations(product, 6)
    found = session(product.graph(), name).run(None, {"x": x.reshape(2, 3, -1)})[0]
    np.testing.assert_array_equal(found.reshape(6, -1), multiply(product, x, name))
    assert session(product.graph(), name).run(None, {"x": x[:0]})[0].shape == (0, 9)


@pytest.mark.parametrize("bits", [4, 8])
def test_onnxruntimes_own_kernels_agree(bits: int) -> None:
    """They round x likewise, but where a number lies between two codes they may take the other."""
    product = Product(rows=64, blocks=4, block=64, bits=bits)
    x = activations(product, 3)
    own, ours = multiply(product, x, BUILT_IN), multiply(product, x, KERNELS[-1])
    # One code in 127 aside for every hundredth number is far more than there is, and far less than an error.
    assert np.abs(own - ours).max() < 1e-3 * np.abs(ours).max()


@pytest.mark.parametrize("name", KERNELS)
def test_they_take_the_place_of_onnxruntimes_own(name: str) -> None:
    """Another accuracy level is another arithmetic, which ours refuse: so they are what runs."""
    graph = Product(rows=9, blocks=2, block=16, bits=8).graph(accuracy_level=0)
    assert session(graph, BUILT_IN).get_outputs()[0].name == "y"
    with pytest.raises(ort.capi.onnxruntime_pybind11_state.RuntimeException, match="accuracy level is 4"):
        session(graph, name)


@pytest.mark.parametrize("name", KERNELS)
def test_other_columns_are_refused(name: str) -> None:
    product = Product(rows=9, blocks=2, block=16, bits=8)
    with pytest.raises(
        ort.capi.onnxruntime_pybind11_state.InvalidArgument, match="another number of columns"
    ):
        multiply(product, np.zeros((1, 16), np.float32), name)
