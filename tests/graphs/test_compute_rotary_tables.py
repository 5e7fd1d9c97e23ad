"""Tables that are computed at load are the stored ones, and cost nothing per step."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from gemma_export.exporter.config import preset
from gemma_export.exporter.decoder import rotary_frequencies, rotary_tables
from gemma_export.graphs.passes.compute_rotary_tables import compute_rotary_tables
from gemma_export.graphs.tensors import InMemory, RotaryTable, add_initializer

SLOTS = 8192
CONFIG = preset("2b")
COS = RotaryTable("rotary_cos", rotary_frequencies(CONFIG), SLOTS, torch.cos)
SIN = replace(COS, name="rotary_sin", function=torch.sin)


def graph_of(*tables: RotaryTable | InMemory) -> ir.Model:
    """Looks the rows of some positions up in each table."""
    positions = ir.Value(name="positions", shape=ir.Shape(["n"]), type=ir.TensorType(ir.DataType.INT64))
    graph = ir.Graph([positions], [], nodes=[], name="tables", opset_imports={"": 24})
    for table in tables:
        node = ir.node("Gather", [add_initializer(graph, table.name, table), positions])
        node.outputs[0].name = f"{table.name}.rows"
        node.outputs[0].shape = ir.Shape(["n", table.shape[1]])
        node.outputs[0].dtype = ir.DataType.FLOAT
        graph.append(node)
        graph.outputs.append(node.outputs[0])
    return ir.Model(graph, ir_version=11)


def test_tables_of_a_whole_context(tmp_path: Path) -> None:
    model = graph_of(COS, SIN)
    assert compute_rotary_tables(model) == 2
    assert {"rotary_cos", "rotary_sin"}.isdisjoint(model.graph.initializers)
    for value in model.graph.initializers.values():
        assert value.const_value is not None
        assert value.const_value.nbytes <= 4 * CONFIG.head_dim // 2
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    found = session.run(None, {"positions": np.arange(SLOTS)})
    for rows, stored in zip(found, rotary_tables(CONFIG, SLOTS), strict=True):
        # The angle is the same fp32 product; two libraries' cosines differ in the last digit.
        np.testing.assert_allclose(rows, stored.numpy(), rtol=0, atol=2**-23)
    optimized = onnx.load(tmp_path / "optimized.onnx")
    assert {node.op_type for node in optimized.graph.node} == {"Gather"}  # All else was evaluated at load.


@pytest.mark.parametrize(
    "tables",
    [
        (InMemory("rotary_cos", COS.read(0, 16)),),
        (COS, replace(SIN, frequencies=COS.frequencies * 2)),
        (COS, replace(SIN, slots=16)),
        (replace(COS, function=torch.tan),),
    ],
    ids=["a stored tensor", "other frequencies", "other positions", "another function"],
)
def test_refused(tables: tuple[RotaryTable, ...]) -> None:
    model = graph_of(*tables)
    before = set(model.graph.initializers)
    assert compute_rotary_tables(model) == 0
    assert set(model.graph.initializers) == before


def test_rows_are_those_of_the_decoder() -> None:
    cos, sin = rotary_tables(CONFIG, 100)
    assert torch.equal(replace(COS, slots=100).read(0, 100), cos)
    assert torch.equal(replace(SIN, slots=100).read(40, 60), sin[40:60])
