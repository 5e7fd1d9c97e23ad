"""A graph's functions by kernels of our own: the numbers of what they are made of, whatever computes them."""

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.matmul_nbits import BUILT_IN, Floats, available, session

from gemma_export.graphs.passes.fuse_functions import fuse_gated_gelu, fuse_residual_norm

KERNELS = available()
pytestmark = pytest.mark.skipif(not KERNELS, reason="the kernels are not compiled here")

SPECIAL = np.array([0.0, -0.0, 1e-40, 30.0, -30.0, -1e4, 1e4, 3e38, -3e38, np.inf, np.nan], np.float32)


def value(name: str, *shape: str | int) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT))


def model(inputs: list[ir.Value], nodes: list[ir.Node], outputs: list[ir.Value]) -> ir.Model:
    for i, made in enumerate(output for node in nodes for output in node.outputs):
        made.name, made.dtype = made.name or f"made_{i}", ir.DataType.FLOAT
    graph = ir.Graph(inputs, outputs, nodes=nodes, name="one", opset_imports={"": 24})
    return ir.Model(graph, ir_version=10)


def gated_gelu() -> onnx.ModelProto:
    x = value("x", "tokens", "columns")
    split = ir.node("Split", [x], {"axis": -1, "num_outputs": 2}, num_outputs=2)
    gelu = ir.node("Gelu", [split.outputs[0]], {"approximate": "tanh"})
    product = ir.node("Mul", [gelu.outputs[0], split.outputs[1]])
    made = model([x], [split, gelu, product], [product.outputs[0]])
    assert fuse_gated_gelu(made) == 1
    return ir.to_proto(made)


def residual_norm() -> onnx.ModelProto:
    stream, added, gain = value("stream", "t", "d"), value("added", "t", "d"), value("gain", "d")
    add = ir.node("Add", [stream, added])
    add.outputs[0].shape = ir.Shape(["t", "d"])
    norm = ir.node("RMSNormalization", [add.outputs[0], gain], {"axis": -1, "epsilon": 1e-6})
    made = model([stream, added, gain], [add, norm], [add.outputs[0], norm.outputs[0]])
    assert fuse_residual_norm(made) == 1
    return ir.to_proto(made)


GATED_GELU, RESIDUAL_NORM = gated_gelu(), residual_norm()
SESSIONS = {
    (id(graph), name, threads): session(graph, name, threads)
    for graph in (GATED_GELU, RESIDUAL_NORM)
    for name in (*KERNELS, BUILT_IN)
    for threads in (1, 3)
}


def run(graph: onnx.ModelProto, name: str, threads: int, **feeds: Floats) -> list[Floats]:
    found: ort.InferenceSession = SESSIONS[id(graph), name, threads]
    outputs: list[Floats] = found.run(None, feeds)
    return outputs


def same_for_all(graph: onnx.ModelProto, **feeds: Floats) -> list[Floats]:
    """What every set of kernels says, bit by bit, on one thread and on three."""
    first, *others = (run(graph, name, threads, **feeds) for name in KERNELS for threads in (1, 3))
    for other in others:
        for one, another in zip(first, other, strict=True):
            np.testing.assert_array_equal(one, another)
    return first


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 20), st.integers(1, 10_000), st.integers(0, 2**32 - 1))
@example(1, 16384, 0)
@example(3, 4097, 0)
def test_an_activation_is_the_functions(tokens: int, columns: int, seed: int) -> None:
    x = np.random.default_rng(seed).normal(0, 4, (tokens, 2 * columns)).astype(np.float32)
    (found,) = same_for_all(GATED_GELU, x=x)
    (expected,) = run(GATED_GELU, BUILT_IN, 1, x=x)
    # Of a gate near -5 a Gelu is what is left of 1 - 1: by tanh it is known to 2^-24 of the gate times up.
    np.testing.assert_allclose(found, expected, rtol=2e-6, atol=2e-5)


def test_an_activation_of_any_number() -> None:
    gates = np.repeat(SPECIAL, 2)
    x = np.concatenate([gates, np.tile(np.float32([1, -2]), len(SPECIAL))])[None]
    (found,) = same_for_all(GATED_GELU, x=x)
    (expected,) = run(GATED_GELU, BUILT_IN, 1, x=x)
    np.testing.assert_allclose(found, expected, rtol=2e-6, atol=1e-6)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 40), st.integers(1, 3000), st.integers(0, 2**32 - 1))
@example(1, 2048, 0)
def test_a_norm_of_a_sum_is_the_functions(tokens: int, channels: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    stream, added = (random.standard_normal((tokens, channels)).astype(np.float32) for _ in range(2))
    gain = random.uniform(-2, 2, channels).astype(np.float32)
    found = same_for_all(RESIDUAL_NORM, stream=stream, added=added, gain=gain)
    expected = run(RESIDUAL_NORM, BUILT_IN, 1, stream=stream, added=added, gain=gain)
    np.testing.assert_array_equal(found[0], expected[0])
    # The squares are summed in another order: some 2^-24 · sqrt(channels) of their sum.
    np.testing.assert_allclose(found[1], expected[1], rtol=5e-6, atol=1e-9)


def test_a_token_of_zeros_has_a_norm_of_zeros() -> None:
    zeros, gain = np.zeros((2, 48), np.float32), np.ones(48, np.float32)
    for output in same_for_all(RESIDUAL_NORM, stream=zeros, added=zeros, gain=gain):
        np.testing.assert_array_equal(output, zeros)


@pytest.mark.parametrize("name", KERNELS)
def test_shapes_that_do_not_fit_are_refused(name: str) -> None:
    x = np.zeros((2, 48), np.float32)
    with pytest.raises(Exception, match="ResidualNorm: the shapes do not fit"):
        run(RESIDUAL_NORM, name, 1, stream=x, added=x, gain=np.zeros(47, np.float32))
    with pytest.raises(Exception, match="GatedGelu: a row of x has two halves"):
        run(GATED_GELU, name, 1, x=np.zeros((1, 7), np.float32))
