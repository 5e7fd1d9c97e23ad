"""Each rule of a graph's spec, broken on purpose."""

from collections.abc import Callable

import onnx_ir as ir
import pytest

from gemma_export.errors import GraphError
from gemma_export.graphs import schedule, spec
from gemma_export.graphs.tensors import InMemory, add_initializer, streamed


def rename_input(graph: ir.Graph) -> None:
    graph.inputs[0].name = "tokens"


def rename_output(graph: ir.Graph) -> None:
    graph.outputs[1].name = "new.0.key"


def free_the_slots(graph: ir.Graph) -> None:
    graph.inputs[2].shape = ir.Shape(["batch", 1, "slots", 16])


def narrow_the_logits(graph: ir.Graph) -> None:
    graph.outputs[0].dtype = ir.DataType.FLOAT16


def narrow_one_cache(graph: ir.Graph) -> None:
    graph.outputs[1].dtype = ir.DataType.FLOAT16


def use_a_foreign_operator(graph: ir.Graph) -> None:
    next(node for node in graph if node.op_type == "Gelu").domain = "com.microsoft"


def forget_a_type(graph: ir.Graph) -> None:
    graph[5].outputs[0].type = None


def forget_a_value(graph: ir.Graph) -> None:
    graph.initializers["norm.gain"].const_value = None


def leave_a_weight_behind(graph: ir.Graph) -> None:
    tensor = streamed(graph.initializers["norm.gain"])
    assert tensor is not None
    add_initializer(graph, "forgotten", tensor.source)


def put_a_node_behind_the_cache(graph: ir.Graph) -> None:
    present = graph.outputs[1]
    copy = ir.node("Identity", [present])
    graph.append(copy)
    copy.outputs[0].name, copy.outputs[0].shape, copy.outputs[0].dtype = "copy", present.shape, present.dtype
    graph.outputs[1] = copy.outputs[0]
    copy.outputs[0].name, present.name = "present.0.key", "hidden"


def write_another_layers_cache(graph: ir.Graph) -> None:
    writer = graph.outputs[1].producer()
    assert writer is not None
    writer.replace_input_with(0, graph.inputs[4])


def store_the_table_again(graph: ir.Graph) -> None:
    table = graph.initializers["embed_tokens.weight"]
    tensor = streamed(table)
    assert tensor is not None
    copy = add_initializer(graph, "lm_head.weight", tensor.source)
    transpose = next(use.node for use in table.uses() if use.node.op_type == "Transpose")
    transpose.replace_input_with(0, copy)


def lose_the_head(graph: ir.Graph) -> None:
    table = graph.initializers["embed_tokens.weight"]
    other = InMemory("other", streamed(table).source.read(0, table.shape[0]))  # type: ignore[union-attr]
    transpose = next(use.node for use in table.uses() if use.node.op_type == "Transpose")
    transpose.replace_input_with(0, add_initializer(graph, "lm_head.weight", other))


def split_a_norm(graph: ir.Graph) -> None:
    next(node for node in graph if node.op_type == "RMSNormalization").op_type = "Softmax"


def mark_causal(graph: ir.Graph) -> None:
    node = next(node for node in graph if node.op_type == "Attention")
    node.attributes["is_causal"] = ir.AttrInt64("is_causal", 1)


def drop_the_mask(graph: ir.Graph) -> None:
    node = next(node for node in graph if node.op_type == "Attention")
    node.replace_input_with(3, None)


BREAKAGES: list[tuple[Callable[[ir.Graph], None], spec.Rule]] = [
    (rename_input, spec.inputs_and_outputs_follow_the_contract),
    (rename_output, spec.inputs_and_outputs_follow_the_contract),
    (free_the_slots, spec.inputs_and_outputs_follow_the_contract),
    (narrow_the_logits, spec.inputs_and_outputs_follow_the_contract),
    (narrow_one_cache, spec.inputs_and_outputs_follow_the_contract),
    (use_a_foreign_operator, spec.only_standard_operators),
    (forget_a_type, spec.every_value_has_a_type),
    (forget_a_value, spec.every_initializer_has_a_value),
    (leave_a_weight_behind, spec.no_initializer_is_unused),
    (put_a_node_behind_the_cache, spec.caches_are_written_straight),
    (write_another_layers_cache, spec.caches_are_written_straight),
    (store_the_table_again, spec.embedding_is_stored_once),
    (lose_the_head, spec.embedding_is_stored_once),
    (split_a_norm, spec.fused_operators_are_all_there),
    (mark_causal, spec.attention_masks_are_explicit),
    (drop_the_mask, spec.attention_masks_are_explicit),
]


@pytest.mark.parametrize(("spoil", "rule"), BREAKAGES, ids=lambda item: item.__name__)
def test_a_broken_rule_is_seen(
    raw_graph: Callable[..., ir.Model], spoil: Callable[[ir.Graph], None], rule: spec.Rule
) -> None:
    model = raw_graph()
    schedule.canonicalize(model)
    assert rule(model) is None
    spoil(model.graph)
    assert rule(model) is not None
    with pytest.raises(GraphError, match="canonical graph breaks the rule"):
        spec.CANONICAL.check(model)


def test_a_cpu_graph_with_an_operator_missing_is_refused(raw_graph: Callable[..., ir.Model]) -> None:
    model = raw_graph()
    schedule.canonicalize(model)
    with pytest.raises(GraphError, match="0 GroupQueryAttention, not 2"):
        spec.CPU.check(model)
