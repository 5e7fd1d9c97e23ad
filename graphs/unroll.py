"""Repeats traced layers, so that tracing costs the same for any depth.

Tracing is paid per operator, seconds for each layer, and every layer of the decoder is the same module. So
only its first layers are traced, as many as hold one of each kind, with marks between them. What lies between
two marks is copied for every further layer of that kind, with the layer's number in each name.
"""

from collections.abc import Sequence

import onnx_ir as ir

from gemma_export.errors import GraphError

LAYER_EDGE = "layer_edge"
"""Extra outputs of the traced graph, with a number: the residual stream before the layer of that number, and
after the last."""


def unroll(model: ir.Model, templates: Sequence[int]) -> int:
    """Turns a decoder of the first layers into one of all; returns how many nodes were copied.

    Layers' initializers are expected as `layers.0.…`, caches as `past_key_values.0.…` and `present.0.…`;
    copies get their own number there. What depends on none of a layer's input, caches and weights is shared.

    Args:
        model: The traced graph, with the marks as its last outputs; they are removed.
        templates: For every layer the traced layer that is like it; for a traced layer itself, any that is.

    Raises:
        GraphError: The marks are not where they should be.
    """
    graph = model.graph
    traced = max(templates) + 1
    names = [f"{LAYER_EDGE}.{i}" for i in range(traced + 1)]
    edges = [value for value in graph.outputs if value.name in names]
    if [value.name for value in edges] != names:
        raise GraphError("The traced graph does not mark its layers.", "This is a defect: please report it.")
    for edge in edges:
        graph.outputs.remove(edge)
    layers = [_Layer(graph, i, edges[i], edges[i + 1]) for i in sorted(set(templates[traced:]))]
    by_number = {layer.number: layer for layer in layers}
    end = edges[-1]
    made = {node for layer in layers for node in layer.nodes}
    rest = [use for use in end.uses() if use.node not in made]
    previous, count = end, 0
    for i, template in enumerate(templates[traced:], start=traced):
        previous = by_number[template].copy(graph, i, previous)
        count += len(by_number[template].nodes)
    for use in rest:
        use.node.replace_input_with(use.idx, previous)
    graph.sort()  # The copies were appended behind the head.
    return count


class _Layer:
    """A traced layer: its nodes, and what a copy has its own of.

    Args:
        graph: The traced graph.
        number: Of the layer.
        start: The residual stream before it.
        end: And after it.
    """

    def __init__(self, graph: ir.Graph, number: int, start: ir.Value, end: ir.Value) -> None:
        def is_own(value: ir.Value) -> bool:
            return str(value.name).startswith(_prefixes(number))

        self.number, self._start, self._end = number, start, end
        self._caches = [value for value in graph.inputs if is_own(value)]
        self._presents = [value for value in graph.outputs if is_own(value)]
        self._weights = [value for value in graph.initializers.values() if is_own(value)]
        inside = _between([start, *self._caches, *self._weights], [end, *self._presents])
        self.nodes = [node for node in graph if node in inside]

    def copy(self, graph: ir.Graph, i: int, previous: ir.Value) -> ir.Value:
        """Appends a copy as layer i behind a residual stream; returns the stream behind the copy."""
        copies: dict[ir.Value, ir.Value] = {self._start: previous}
        for cache in self._caches:
            copies[cache] = self._like(cache, i)
            graph.inputs.append(copies[cache])
        for weight in self._weights:
            copies[weight] = self._like(weight, i)
            graph.initializers.add(copies[weight])
        for node in self.nodes:
            self._copy_node(graph, node, copies, i)
        graph.outputs.extend(copies[present] for present in self._presents)
        return copies[self._end]

    def _copy_node(self, graph: ir.Graph, node: ir.Node, copies: dict[ir.Value, ir.Value], i: int) -> None:
        copy = ir.Node(
            node.domain,
            node.op_type,
            [None if operand is None else copies.get(operand, operand) for operand in node.inputs],
            list(node.attributes.values()),
            num_outputs=len(node.outputs),
            name=f"{node.name}.{i}",
        )
        for old, new in zip(node.outputs, copy.outputs, strict=True):
            new.name = self._renamed(str(old.name), i)
            # Assigned by dtype: a type is an object, and layers that shared one would change format together.
            new.shape, new.const_value = old.shape, old.const_value
            if old.dtype is not None:
                new.dtype = old.dtype
            copies[old] = new
        graph.append(copy)

    def _like(self, value: ir.Value, i: int) -> ir.Value:
        assert value.dtype is not None
        name = self._renamed(str(value.name), i)
        return ir.Value(name=name, shape=value.shape, type=ir.TensorType(value.dtype))

    def _renamed(self, name: str, i: int) -> str:
        """The name of the same thing in layer i."""
        for old, new in zip(_prefixes(self.number), _prefixes(i), strict=True):
            if name.startswith(old):
                return new + name.removeprefix(old)
        return f"{name}.{i}"


def _prefixes(number: int) -> tuple[str, ...]:
    """How names of what belongs to a layer begin: weights, caches, updated caches."""
    return f"layers.{number}.", f"past_key_values.{number}.", f"present.{number}."


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
