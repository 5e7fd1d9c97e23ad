"""Gemma 2 in small, compiled by the real TensorRT for RTX: attention in parts, and no cache is copied."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir
import pytest
from support.engine_graphs import SLOTS, Written, write_engine_graph

from gemma_export.errors import EngineError
from gemma_export.exporter.engines.engine_graph import CacheProduct, EngineGraph, read_graph
from gemma_export.exporter.engines.network import CacheUpdate, NetworkFacts
from gemma_export.exporter.engines.plan import Kernel, PlanTensor, PlanText
from gemma_export.exporter.engines.plan_audit import audit_plan, check_network
from gemma_export.exporter.engines.profiles import Profile
from gemma_export.runtime.manifest import Range

LAYERS, GROUPS = 2, 2


@pytest.fixture(scope="module")
def capped_graph(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Written]:
    written: dict[str, Written] = {}

    def graph(scheme: str) -> Written:
        if scheme not in written:
            folder = tmp_path_factory.mktemp(f"capped-{scheme}")
            written[scheme] = write_engine_graph(folder, scheme, LAYERS, capped=True)
        return written[scheme]

    return graph


@pytest.mark.parametrize(
    ("scheme", "sms"),
    [*((scheme, (75, 89)) for scheme in ("fp16", "w8a16", "w8a8")), *((s, (89,)) for s in ("bf16", "w4a16"))],
)
def test_every_scheme_compiles_into_what_was_asked_for(
    capped_graph: Callable[[str], Written], tmp_path: Path, scheme: str, sms: tuple[int, ...]
) -> None:
    engines = capped_graph(scheme).build(tmp_path, *sms, max_batch=4)
    assert [engine.sms for engine in engines] == [(sm,) for sm in sms]
    for engine in engines:
        # No attention is one kernel; the audit has seen that each product is, and reads its cache.
        assert not any("mha" in kind for kind in engine.kernels)
        products = LAYERS * (4 + 2 * GROUPS) + 1
        assert engine.kernels["gemm"] <= 3 * products
        assert [profile.name for profile in engine.profiles] == ["prefill", "decode", "decode-batch"]


def test_a_graph_for_sm_75_needs_no_more_arithmetic(tmp_path: Path) -> None:
    graph = write_engine_graph(tmp_path / "graph", "w8a16", LAYERS, capped=True, sms=(75,))
    nodes = [node.op_type for node in ir.load(graph.file).graph]
    assert nodes.count("Max") == LAYERS
    (engine,) = graph.build(tmp_path, 75)
    assert engine.sms == (75,)


def test_the_graph_names_the_products_with_caches(capped_graph: Callable[[str], Written]) -> None:
    graph = read_graph(capped_graph("fp16").file)
    assert graph.attentions == 0
    assert graph.slots == SLOTS
    assert [product.cache for product in graph.products].count("present.1.value") == GROUPS
    assert {product.cache for product in graph.products} == set(graph.caches)
    assert len(graph.products) == 2 * GROUPS * LAYERS


def nodes(graph: ir.Graph, part: str) -> list[ir.Node]:
    return [node for node in graph if part in str(node.name)]


def values_that_are_not_turned(graph: ir.Graph) -> None:
    """weights · value, as attention is written everywhere."""
    for product in nodes(graph, ".attended."):
        values, columns = maker(product.inputs[0]).inputs[0], product.inputs[1]
        upright = product.outputs[0].uses()[0].node
        rows = ir.node("Transpose", [columns], {"perm": [0, 1, 3, 2]}, name=f"{product.name}.rows")
        straight = ir.node("MatMul", [rows.outputs[0], values], name=f"{product.name}.straight")
        for node in (rows, straight):
            node.outputs[0].name = node.name
        graph.insert_before(product, [rows, straight])
        upright.outputs[0].replace_all_uses_with(straight.outputs[0])
        graph.remove([upright, product], safe=True)


def maker(value: ir.Value | None) -> ir.Node:
    assert value is not None
    node = value.producer()
    assert node is not None
    return node


def test_a_spelling_that_copies_the_cache_is_found(
    capped_graph: Callable[[str], Written], tmp_path: Path
) -> None:
    graph = capped_graph("fp16").changed("straight", values_that_are_not_turned)
    with pytest.raises(EngineError, match=r"present\.\d\.value is copied for .*, in the profile decode"):
        graph.build(tmp_path, 89)
    assert list((tmp_path / "engines").iterdir()) == []


# The rules alone

ONE = Range(1, 1, 1)
PROFILES = (Profile("prefill", ONE, Range(1, 8, 8)), Profile("decode", ONE, ONE))
CACHES = ("present.0.key", "present.0.value")
PRODUCTS = (CacheProduct("scores", CACHES[0]), CacheProduct("attended", CACHES[1]))
GRAPH = EngineGraph(Path("model.onnx"), (), CACHES, 8, (), frozenset(), attentions=0, products=PRODUCTS)


def kernel(profile: int, kind: str, operator: str, *inputs: str, outputs: tuple[str, ...] = ()) -> Kernel:
    read, written = (tuple(PlanTensor(name, 64, "Half") for name in names) for names in (inputs, outputs))
    return Kernel(f"k_myl{profile}_0", kind, profile, read, (), written, frozenset({operator}))


def findings(decode: list[Kernel]) -> str:
    kernels = [kernel(index, "kgen", "write", *CACHES, outputs=CACHES) for index in (0, 1)]
    # For several tokens a cache is turned before it is read.
    kernels += [kernel(0, "gemm", product.operator, "turned") for product in PRODUCTS]
    plan = PlanText((*kernels, *decode), 0, (1, 1))
    return "; ".join(audit_plan(plan, GRAPH, PROFILES, 0).findings)


def test_what_is_read_where_it_lies_has_no_findings() -> None:
    assert findings([kernel(1, "gemm", p.operator, "x", p.cache) for p in PRODUCTS]) == ""


def test_a_copy_and_a_product_that_is_missing_are_found() -> None:
    scores = kernel(1, "gemm", "scores", "x", CACHES[0])
    copy = [kernel(1, "kgen", "", CACHES[1], outputs=("copy",)), kernel(1, "gemm", "attended", "x", "copy")]
    assert findings([scores, *copy]) == "present.0.value is copied for attended, in the profile decode"
    assert findings([scores]) == "attended is 0 kernels in the profile decode"
    both = [kernel(1, "gemm", "attended", "x", CACHES[1])] * 2
    assert findings([scores, *both]) == "attended is 2 kernels in the profile decode"


def test_a_layer_without_attention_is_found() -> None:
    facts = NetworkFacts({}, tuple(CacheUpdate(name, True, True) for name in CACHES), ())
    check_network(facts, GRAPH, 1)
    with pytest.raises(EngineError, match="it has 0 attentions for 1 layers"):
        check_network(facts, replace(GRAPH, products=()), 1)
