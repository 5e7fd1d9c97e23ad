"""Repeats a traced layer, so that tracing costs the same for any depth.

Tracing is paid per operator, seconds for each layer, and every layer of the decoder is the same module. So
one layer is traced between two marks, and what lies between them is copied, with the layer's number in each
name. What layers differ in is their mask; each kind's is made once, and marked.
"""

from collections.abc import Sequence

import onnx_ir as ir

from gemma_export.errors import GraphError

LAYER_INPUT, LAYER_OUTPUT = "layer_input", "layer_output"
"""Extra outputs of the traced graph: the residual stream before and after the layer."""
LAYER_MASK = "layer_mask"
"""The same of a mask, with its number; the traced layer reads the first."""


def unroll(model: ir.Model, masks: Sequence[int]) -> int:
    """Turns a decoder of one layer into one of many; returns how many nodes a layer has.

    Layers' initializers are expected as `layers.0.…`, caches as `past_key_values.0.…` and `present.0.…`;
    copies get their own number there. What depends on none of the layer's input, mask, caches and weights is
    shared.

    Args:
        model: The traced graph, with the marks as its last outputs; they are removed.
        masks: The number of every layer's mask; at least one.

    Raises:
        GraphError: The marks are not where they should be.
    """
    graph = model.graph
    names = [LAYER_INPUT, LAYER_OUTPUT, *(f"{LAYER_MASK}.{i}" for i in range(max(masks) + 1))]
    marks = [value for value in graph.outputs if value.name in names]
    if [value.name for value in marks] != names:
        raise GraphError("The traced graph does not mark its layer.", "This is a defect: please report it.")
    start, end, *marked_masks = marks
    for mark in marks:
        graph.outputs.remove(mark)
    caches, presents = list(graph.inputs[2:]), list(graph.outputs[1:])
    weights = [value for value in graph.initializers.values() if _is_weight(value)]
    layer = _between([start, marked_masks[0], *caches, *weights], [end, *presents])
    nodes = [node for node in graph if node in layer]
    rest = [use for use in end.uses() if use.node not in layer]
    previous = end
    for i, mask in enumerate(masks[1:], start=1):
        copies: dict[ir.Value, ir.Value] = {start: previous, marked_masks[0]: marked_masks[mask]}
        for cache in caches:
            copies[cache] = _like(cache, i)
            graph.inputs.append(copies[cache])
        for weight in weights:
            copies[weight] = _like(weight, i)
            graph.initializers.add(copies[weight])
        for node in nodes:
            _copy(graph, node, copies, i)
        previous = copies[end]
        graph.outputs.extend(copies[present] for present in presents)
    for use in rest:
        use.node.replace_input_with(use.idx, previous)
    graph.sort()  # The copies were appended behind the head.
    return len(nodes)


def _between(sources: list[ir.Value], sinks: list[ir.Value]) -> set[ir.Node]:
    """Nodes that some sink needs and that depend on some source."""
    depends: dict[ir.Value, bool] = dict.fromkeys(sources, True)
    found: set[ir.Node] = set()

    def reaches(value: ir.Value) -> bool:
        if value not in depends:
            producer = value.producer()
            inputs = () if producer is None else producer.inputs
            # A list, not a generator: all are looked at, so that every node that depends is found.
            reached = [reaches(operand) for operand in inputs if operand is not None]
            depends[value] = any(reached)
            if depends[value] and producer is not None:
                found.add(producer)
        return depends[value]

    for sink in sinks:
        reaches(sink)
    return found


def _is_weight(value: ir.Value) -> bool:
    return value.is_initializer() and str(value.name).startswith("layers.0.")


def _copy(graph: ir.Graph, node: ir.Node, copies: dict[ir.Value, ir.Value], i: int) -> None:
    copy = ir.Node(
        node.domain,
        node.op_type,
        [None if operand is None else copies.get(operand, operand) for operand in node.inputs],
        list(node.attributes.values()),
        num_outputs=len(node.outputs),
        name=f"{node.name}.{i}",
    )
    for old, new in zip(node.outputs, copy.outputs, strict=True):
        new.name = _renamed(str(old.name), i)
        # Assigned by dtype: a type is an object, and layers that shared one would change format together.
        new.shape, new.const_value = old.shape, old.const_value
        if old.dtype is not None:
            new.dtype = old.dtype
        copies[old] = new
    graph.append(copy)


def _like(value: ir.Value, i: int) -> ir.Value:
    assert value.dtype is not None
    return ir.Value(name=_renamed(str(value.name), i), shape=value.shape, type=ir.TensorType(value.dtype))


def _renamed(name: str, i: int) -> str:
    """The name of the same thing in layer i."""
    for prefix in ("layers.", "past_key_values.", "present."):
        if name.startswith(f"{prefix}0."):
            return f"{prefix}{i}.{name.removeprefix(f'{prefix}0.')}"
    return f"{name}.{i}"
