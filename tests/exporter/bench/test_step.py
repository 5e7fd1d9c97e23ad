"""Where the time of a token goes: what onnxruntime's profile is read as."""

from pathlib import Path

import pytest

from gemma_export.exporter.bench.step import GraphRun, graph_runs, measure_step, part_of


def node(name: str, at: int, took: int, *shapes: list[int]) -> dict[str, object]:
    inputs = [{"float": shape} for shape in shapes]
    return {
        "cat": "Node",
        "name": f"{name}_kernel_time",
        "ts": at,
        "dur": took,
        "args": {"op_name": name, "input_type_shape": inputs},
    }


def run(at: int, took: int) -> dict[str, object]:
    return {"cat": "Session", "name": "model_run", "ts": at, "dur": took}


def test_operators_belong_to_the_run_around_them() -> None:
    events = [
        {"cat": "Session", "name": "session_initialization", "ts": 0, "dur": 50},
        node("MatMulNBits", 110, 40, [1, 1, 32], [64, 32]),
        node("Add", 160, 10, [1, 1, 32], [1, 1, 32]),
        run(100, 100),
        node("MatMul", 310, 30, [1, 1, 32], [32, 64]),
        node("GroupQueryAttention", 350, 20, [1, 1, 96], [1, 1, 64, 16]),
        {**node("Add", 380, 5, [1, 1, 32]), "name": "Add_fence_before"},
        run(300, 200),
    ]
    assert graph_runs(events) == [
        GraphRun(whole=100e-6, weights=40e-6, cache=0, others=10e-6),
        GraphRun(whole=200e-6, weights=30e-6, cache=20e-6, others=0),
    ]


@pytest.mark.parametrize(
    ("name", "shapes", "part"),
    [
        ("MatMulInteger", [[1, 1, 256], []], "weights"),  # Packed, a weight is no input any more.
        ("DynamicQuantizeMatMul", [[1, 1, 256], [256, 512]], "weights"),
        ("Gemm", [[1, 256], [256, 512]], "weights"),
        ("MatMul", [[1, 1, 8, 256], [1, 1, 256, 512]], "cache"),
        ("Softmax", [[1, 1, 8, 512]], "cache"),
        ("TensorScatter", [[1, 1, 512, 128], [1, 1, 1, 128], [1]], "cache"),
        ("Sub", [[1, 1, 1, 256], []], "others"),
        ("RMSNormalization", [[1, 1, 256], [256]], "others"),
        ("Shape", [], "others"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_operator_is_known_by_what_it_reads(name: str, shapes: list[list[int]], part: str) -> None:
    assert part_of(node(name, 0, 1, *shapes)["args"]) == part


def test_a_bundle_in_parts(tiny_bundle: Path) -> None:
    parts = measure_step(tiny_bundle, depth=40, tokens=3, threads=1)
    assert parts.depth == 40
    for name in ("weights", "cache", "others", "around", "choosing", "drawing"):
        assert getattr(parts, name) > 0, name
    assert parts.between >= 0
