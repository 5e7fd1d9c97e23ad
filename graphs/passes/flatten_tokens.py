"""For TensorRT: the tokens of all rows of a batch lie one behind the other, on one axis.

    Gather(E, input_ids) [B, T, d] → MatMul → …
        →  Gather(E, Reshape(input_ids, [1, -1])) [1, B·T, d] → MatMul → …

With an axis for the batch TensorRT takes another kernel for the rows of a batch than for the tokens of one
row, and the two want the weight in layouts of their own: an engine with a profile for several rows would
store it twice. The axis of one in front stays: without it the builder needs twice the memory.

What needs to know the rows gets the two axes back, [B, T, ..]: the reshape to heads, the last token's slice
where there is one, and the logits.

Illegal, and an error, when the hidden states go through an operator that is none of those of the canonical
graph: it could tell [1, B·T, d] from [B, T, d].
"""

import onnx_ir as ir

from gemma_export.errors import GraphError
from gemma_export.graphs.passes.merge_projections import find_linear
from gemma_export.graphs.passes.patterns import ints, last_dim, stand_in
from gemma_export.graphs.passes.quantized_layers import add_constant
from gemma_export.graphs.tensors import streamed

BY_CHANNEL = frozenset({"Add", "Div", "Gelu", "MatMul", "Max", "Mul", "RMSNormalization", "Tanh"})
"""Operators that do the same with every token."""
TOKENS, LAST_TOKENS = ir.SymbolicDim("tokens_of_all_rows"), ir.SymbolicDim("last_tokens_of_all_rows")
"""Names of the one axis: of all tokens, and of each row's last."""


def flatten_tokens(model: ir.Model) -> int:
    """Rewrites the decoder from its lookup to its logits; returns how many products have one row now.

    Args:
        model: The canonical graph; a Gather with the graph's `input_ids` begins what is rewritten.

    Raises:
        GraphError: An operator is in the way.
    """
    graph = model.graph
    decoder = _Decoder(graph)
    for node in list(graph):
        decoder.rewrite(node)
    decoder.finish()
    products = (linear for node in graph if (linear := find_linear(node)) is not None)
    return sum(linear.output in decoder.flat for linear in products)


class _Decoder:
    """A graph that is rewritten from its beginning on.

    Attributes:
        flat: The values that have one axis for all tokens, and its name.
    """

    def __init__(self, graph: ir.Graph) -> None:
        self.flat: dict[ir.Value, ir.SymbolicDim] = {}
        self._graph, self._ids = graph, graph.inputs[0]
        self._first, self._shapes = graph[0], dict[str, ir.Value]()

    def rewrite(self, node: ir.Node) -> None:
        """Rewrites what reads hidden states, or begins or continues them."""
        read = [value for value in node.inputs if value is not None and value in self.flat]
        if node.op_type == "Gather" and node.inputs[1] is self._ids and streamed(node.inputs[0]) is not None:
            node.replace_input_with(1, self._all_tokens())
            self._flatten(node.outputs[0], TOKENS)
        elif node.op_type == "Reshape" and not read and _merges_heads(node):
            node.replace_input_with(1, self._sizes([1, -1, _width(node.outputs[0])]))
            self._flatten(node.outputs[0], TOKENS)
        elif read and self._keeps_tokens_apart(node):
            for output in node.outputs:
                self._flatten(output, self.flat[read[0]])
        elif read and node.op_type == "Reshape" and (ints(node.inputs[1]) or [])[:2] == [0, 0]:
            node.replace_input_with(1, self._rows_and((ints(node.inputs[1]) or [])[2:]))
        elif read and node.op_type == "Slice" and read == [node.inputs[0]]:
            self._slice(node, read[0])
        elif read:
            raise GraphError(
                f"The tokens of all rows cannot lie on one axis: a {node.op_type} reads {read[0].name}.",
                "This is a defect of a graph pass: please report it with the command that was run.",
            )

    def finish(self) -> None:
        """Gives the logits the axes of the contract, under their name."""
        logits = self._graph.outputs[0]
        if logits not in self.flat:
            return
        rows, vocabulary = self.flat[logits], _width(logits)
        sizes = self._rows_and([vocabulary]) if rows is TOKENS else self._sizes([-1, 1, vocabulary])
        reshape = ir.node("Reshape", [logits, sizes])
        output, product = reshape.outputs[0], logits.producer()
        assert product is not None
        stand_in(output, logits)
        output.shape = ir.Shape(["batch", "tokens" if rows is TOKENS else 1, vocabulary])
        name = "lm_head" if find_linear(product) is not None else "soft_cap"
        self._graph.outputs[0], logits.name, product.name = output, name, name
        self._graph.insert_after(product, reshape)

    def _keeps_tokens_apart(self, node: ir.Node) -> bool:
        """Whether a node does the same with every token of what it reads."""
        if node.op_type == "Split":
            return node.attributes.get_int("axis", 0) == -1
        if node.op_type == "MatMul":
            return find_linear(node) is not None
        # The other operand is hidden states too, or one number per channel.
        shapes = [value.shape for value in node.inputs if value is not None and value not in self.flat]
        return node.op_type in BY_CHANNEL and all(shape is not None and len(shape) <= 1 for shape in shapes)

    def _slice(self, node: ir.Node, hidden: ir.Value) -> None:
        """The last token of every row: sliced with both axes, and then on one again."""
        width = _width(hidden)
        apart = ir.node("Reshape", [hidden, self._rows_and([width])])
        together = ir.node("Reshape", [node.outputs[0], self._sizes([1, -1, width])])
        output, last = apart.outputs[0], together.outputs[0]
        for value in (output, last):
            stand_in(value, hidden)
        output.name, output.shape = f"{hidden.name}.rows", ir.Shape(["batch", "tokens", width])
        last.name = f"{node.outputs[0].name}.tokens"
        node.outputs[0].replace_all_uses_with(last)
        together.replace_input_with(0, node.outputs[0])
        node.replace_input_with(0, output)
        self._graph.insert_before(node, apart)
        self._graph.insert_after(node, together)
        self._flatten(last, LAST_TOKENS, width)

    def _flatten(self, value: ir.Value, tokens: ir.SymbolicDim, width: int | None = None) -> None:
        value.shape = ir.Shape([1, tokens, _width(value) if width is None else width])
        self.flat[value] = tokens

    def _all_tokens(self) -> ir.Value:
        """The ids of all rows [1, B·T]."""
        node = ir.node("Reshape", [self._ids, self._sizes([1, -1])])
        return self._begin(node, "input_ids.of_all_rows", [1, TOKENS])

    def _rows_and(self, sizes: list[int]) -> ir.Value:
        """The shape [B, T, ..]; one value, and one Shape, for all that want the same."""
        if not self._shapes:
            self._shapes[""] = self._begin(ir.node("Shape", [self._ids]), "shape_batch_tokens", [2])
        name = f"shape_batch_tokens_{'_'.join(map(str, sizes))}"
        if name not in self._shapes:
            parts = [self._shapes[""], self._sizes(sizes)]
            node = ir.node("Concat", parts, attributes={"axis": 0})
            self._shapes[name] = self._begin(node, name, [2 + len(sizes)])
        return self._shapes[name]

    def _begin(self, node: ir.Node, name: str, shape: list[int | ir.SymbolicDim]) -> ir.Value:
        """Puts a node that makes int64 before all others."""
        output = node.outputs[0]
        output.name, output.shape, output.dtype = name, ir.Shape(shape), ir.DataType.INT64
        self._graph.insert_before(self._first, node)
        return output

    def _sizes(self, sizes: list[int]) -> ir.Value:
        return add_constant(self._graph, f"shape_{'_'.join(map(str, sizes))}", sizes, ir.DataType.INT64)


def _merges_heads(node: ir.Node) -> bool:
    """Whether a node makes hidden states [B, T, H·h] of heads [B, T, H, h]."""
    heads, sizes = node.inputs[0], ints(node.inputs[1])
    assert heads is not None
    return sizes is not None and len(sizes) == 3 and sizes[:2] == [0, 0] and len(heads.shape or ()) == 4


def _width(value: ir.Value) -> int:
    width = last_dim(value)
    assert width is not None, value.name
    return width
