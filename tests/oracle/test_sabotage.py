"""The parity gate refuses a bundle that was made wrong: each defect alone, in a bundle that passed before.

The bundle is changed on the disk, in its weights or in its graph, gets a manifest whose hashes are right, and
is measured again.
"""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx.inliner
import onnx_ir as ir
import pytest

from gemma_export.exporter.bundle import describe_files, write_manifest
from gemma_export.exporter.events import ignore
from gemma_export.exporter.parity.measure import measure_bundle
from gemma_export.exporter.parity.report import ParityReport
from gemma_export.exporter.pipeline import BuildResult
from gemma_export.runtime.bundle import Manifest, open_bundle

pytestmark = pytest.mark.slow

Weights = Callable[[str], npt.NDArray[np.float32]]
Graph = onnx.GraphProto


@pytest.fixture
def cpu_copy(tiny_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundle, tmp_path / "cpu"))


@pytest.fixture
def onnx_copy(build_once: Callable[..., BuildResult], tmp_path: Path) -> Path:
    return Path(shutil.copytree(build_once(size="tiny", target="onnx").path, tmp_path / "onnx"))


def measure(bundle: Path) -> ParityReport:
    """Gives the bundle a manifest that fits its files, and holds it against its checkpoint."""
    manifest = Manifest.from_json((bundle / "manifest.json").read_text())
    write_manifest(bundle, replace(manifest, files=describe_files(bundle, {})))
    assert open_bundle(bundle, check="full").extra == ()
    return measure_bundle(
        bundle, checkpoint=None, reference="eager", text=None, level="quick", listener=ignore
    )


@contextmanager
def stored_weights(bundle: Path) -> Iterator[Weights]:
    """Gives any stored weight as an array that writes to the data file."""
    data = np.memmap(bundle / "model.onnx.data", np.uint8, "r+")
    initializers = ir.load(bundle / "model.onnx").graph.initializers

    def weight(name: str) -> npt.NDArray[np.float32]:
        tensor = initializers[name].const_value
        assert isinstance(tensor, ir.ExternalTensor)
        assert tensor.dtype == ir.DataType.FLOAT
        assert tensor.offset is not None
        assert tensor.length is not None
        return (
            data[tensor.offset : tensor.offset + tensor.length].view(np.float32).reshape(tensor.shape.numpy())
        )

    yield weight
    data.flush()


def swap_two_layers(weight: Weights) -> None:
    one, other = weight("layers.1.mlp.down_proj.weight"), weight("layers.3.mlp.down_proj.weight")
    one[...], other[...] = other.copy(), one.copy()


def negate_a_block(weight: Weights) -> None:
    weight("layers.2.self_attn.o_proj.weight")[:, :64] *= -1


def scale_the_embedding(weight: Weights) -> None:
    weight("embed_tokens.weight")[...] *= 1.01


def gate_and_up_exchanged(weight: Weights) -> None:
    merged = weight("layers.0.mlp.gate_up_proj.weight")
    half = len(merged) // 2
    merged[...] = np.concatenate([merged[half:], merged[:half]])


def a_transposed_square(weight: Weights) -> None:
    square = weight("layers.4.self_attn.o_proj.weight")[:, :256]
    square[...] = square.T.copy()


def tables_that_begin_at_one(weight: Weights) -> None:
    """Rotations are relative, so the logits are right and only the keys are not."""
    for name in ("rotary_cos", "rotary_sin"):
        table = weight(name)
        table[:-1] = table[1:].copy()


def tables_of_another_base(weight: Weights) -> None:
    """theta 11,000 instead of 10,000: a hundred positions turn by a tenth less, at the most."""
    cos, sin = weight("rotary_cos"), weight("rotary_sin")
    columns = cos.shape[1]
    angles = np.arange(len(cos))[:, None] * 11_000.0 ** (-np.arange(columns) / columns)
    cos[...], sin[...] = np.cos(angles), np.sin(angles)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (swap_two_layers, "layer 2"),
        (negate_a_block, "layer 3"),
        (scale_the_embedding, "relative error"),
        (gate_and_up_exchanged, "layer 1"),
        (a_transposed_square, "relative error"),
        (tables_that_begin_at_one, "keys of layer 0"),
        (tables_of_another_base, "keys of layer 0"),
    ],
    ids=lambda value: value.replace(" ", "_") if isinstance(value, str) else value.__name__,
)
def test_wrong_weights_are_refused(spoil: Callable[[Weights], None], reason: str, cpu_copy: Path) -> None:
    with stored_weights(cpu_copy) as weight:
        spoil(weight)
    report = measure(cpu_copy)
    assert report.verdict == "fail"
    # The first cached keys and values that are wrong are those of the layer after the one that was spoilt.
    assert any(reason in found for found in report.reasons), report.reasons


def change_graph(bundle: Path, change: Callable[[Graph], None]) -> None:
    model = onnx.inliner.inline_local_functions(onnx.load(bundle / "model.onnx", load_external_data=False))
    change(model.graph)
    onnx.save(model, bundle / "model.onnx")


def of_type(graph: Graph, op_type: str) -> list[onnx.NodeProto]:
    found = [node for node in graph.node if node.op_type == op_type]
    assert found
    return found


def set_attribute(node: onnx.NodeProto, name: str, value: Any) -> None:
    for attribute in [attribute for attribute in node.attribute if attribute.name == name]:
        node.attribute.remove(attribute)
    node.attribute.append(onnx.helper.make_attribute(name, value))


def exact_gelu(graph: Graph) -> None:
    for node in of_type(graph, "Gelu"):
        set_attribute(node, "approximate", "none")


def a_scale_that_is_off_by_one_percent(graph: Graph) -> None:
    for node in of_type(graph, "GroupQueryAttention"):
        set_attribute(node, "scale", 1.01 * 128**-0.5)


def no_rotation(graph: Graph) -> None:
    for node in of_type(graph, "GroupQueryAttention"):
        set_attribute(node, "do_rotary", 0)
        del node.input[7:]


def an_interleaved_rotation(graph: Graph) -> None:
    for node in of_type(graph, "GroupQueryAttention"):
        set_attribute(node, "rotary_interleaved", 1)


def a_sliding_window(graph: Graph) -> None:
    for node in of_type(graph, "GroupQueryAttention"):
        set_attribute(node, "local_window_size", 32)


def a_window_in_one_layer(graph: Graph) -> None:
    set_attribute(of_type(graph, "GroupQueryAttention")[2], "local_window_size", 32)


def capped_scores(graph: Graph) -> None:
    for node in of_type(graph, "GroupQueryAttention"):
        set_attribute(node, "softcap", 50.0)


def gains_without_their_one(graph: Graph) -> None:
    """The stored weight as it is in the checkpoint: the gain is 1 + that."""
    for tensor in graph.initializer:
        if tensor.name.endswith(".gain"):
            gain = onnx.numpy_helper.to_array(tensor)
            tensor.CopyFrom(onnx.numpy_helper.from_array(gain - 1, tensor.name))


def another_epsilon(graph: Graph) -> None:
    for node in of_type(graph, "RMSNormalization"):
        set_attribute(node, "epsilon", 1e-3)


@pytest.mark.parametrize(
    "change",
    [
        exact_gelu,
        a_scale_that_is_off_by_one_percent,
        no_rotation,
        an_interleaved_rotation,
        a_sliding_window,
        a_window_in_one_layer,
        capped_scores,
        gains_without_their_one,
        another_epsilon,
    ],
    ids=lambda change: change.__name__,
)
def test_a_wrong_graph_for_cpu_is_refused(change: Callable[[Graph], None], cpu_copy: Path) -> None:
    change_graph(cpu_copy, change)
    report = measure(cpu_copy)
    assert report.verdict == "fail"
    assert report.reasons


def a_mask_without_the_token_itself(graph: Graph) -> None:
    for node in of_type(graph, "LessOrEqual"):
        node.op_type = "Less"


def no_mask(graph: Graph) -> None:
    for node in of_type(graph, "Attention"):
        del node.input[3:]


def keys_that_are_not_rotated(graph: Graph) -> None:
    rotations = of_type(graph, "RotaryEmbedding")
    scattered = {node.input[1] for node in of_type(graph, "TensorScatter")}
    for node in rotations:
        if node.output[0] in scattered:
            node.op_type = "Identity"
            del node.input[1:]
            del node.attribute[:]


def every_token_at_the_first_slot(graph: Graph) -> None:
    """As if the number of valid slots were always zero."""
    for node in of_type(graph, "TensorScatter"):
        del node.input[2:]


@pytest.mark.parametrize(
    "change",
    [
        a_mask_without_the_token_itself,
        no_mask,
        keys_that_are_not_rotated,
        every_token_at_the_first_slot,
        exact_gelu,
    ],
    ids=lambda change: change.__name__,
)
def test_a_wrong_canonical_graph_is_refused(change: Callable[[Graph], None], onnx_copy: Path) -> None:
    change_graph(onnx_copy, change)
    report = measure(onnx_copy)
    assert report.verdict == "fail"
    assert report.reasons


@pytest.mark.parametrize("target", ["cpu", "onnx"])
def test_a_copy_that_nothing_was_done_to_passes(target: str, request: pytest.FixtureRequest) -> None:
    copy = request.getfixturevalue(f"{target}_copy")
    change_graph(copy, lambda graph: None)
    with stored_weights(copy) as weight:
        weight("embed_tokens.weight")[...] *= 1
    assert measure(copy).verdict == "pass"
