"""Query, key and value projections of a layer become one product over one weight.

    x·Wqᵀ, x·Wkᵀ, x·Wvᵀ, each reshaped to heads  →  Split(Transpose(Reshape(x · [Wq; Wk; Wv]ᵀ)), heads axis)

The merged weight is the three one below the other, which is how the bytes are written: nothing is computed.
It is reshaped to heads BEFORE it is split: a plain split makes TensorRT store the weight once per profile.

Illegal when:
  (1) the three do not read the same x;
  (2) a weight is not stored, has another use, or the formats differ;
  (3) the heads are not equally wide.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from gemma_export.graphs.passes.patterns import constant, last_dim, stand_in, users
from gemma_export.graphs.tensors import ConcatRows, RowSource, StreamedTensor, add_initializer, streamed


@dataclass(frozen=True)
class Linear:
    """One `MatMul(x, Transpose(weight))` over a stored weight [N, K]."""

    product: ir.Node
    weight: ir.Value
    tensor: StreamedTensor

    @property
    def output(self) -> ir.Value:
        """The product [.., N]."""
        return self.product.outputs[0]


def find_linear(product: ir.Node | None) -> Linear | None:
    """The linear layer whose product this is, or None."""
    if product is None or product.op_type != "MatMul" or product.inputs[1] is None:
        return None
    transpose = product.inputs[1].producer()
    if transpose is None or transpose.op_type != "Transpose":
        return None
    weight = transpose.inputs[0]
    tensor = streamed(weight)
    if weight is None or tensor is None or len(tensor.source.shape) != 2:
        return None
    return Linear(product, weight, tensor)


def linears_by_input(graph: ir.Graph) -> dict[ir.Value, list[Linear]]:
    """Every linear layer, grouped by the value it reads, in the graph's order."""
    groups: dict[ir.Value, list[Linear]] = {}
    for node in graph:
        linear = find_linear(node)
        if linear is not None and linear.product.inputs[0] is not None:
            groups.setdefault(linear.product.inputs[0], []).append(linear)
    return groups


def mergeable(linears: Sequence[Linear]) -> bool:
    """Whether the weights may become one: each used once, all of one format."""
    return len({linear.tensor.dtype for linear in linears}) == 1 and all(
        len(linear.weight.uses()) == 1 for linear in linears
    )


def merge_weights(graph: ir.Graph, linears: Sequence[Linear], name: str) -> ir.Value:
    """One initializer with the linears' weights one below the other."""
    sources: tuple[RowSource, ...] = tuple(linear.tensor.source for linear in linears)
    return add_initializer(graph, name, ConcatRows(sources))


def insert_product(linears: Sequence[Linear], merged: ir.Value) -> ir.Value:
    """The merged product [B, T, N], inserted before the first of the linears."""
    first = linears[0].product
    transpose = ir.node("Transpose", [merged], attributes={"perm": [1, 0]})
    product = ir.node("MatMul", [first.inputs[0], transpose.outputs[0]])
    graph = first.graph
    assert graph is not None
    assert first.outputs[0].shape is not None
    assert merged.shape is not None
    graph.insert_before(first, [transpose, product])
    name = str(merged.name).removesuffix(".weight")
    transpose.outputs[0].name, product.outputs[0].name = f"{name}.weight_t", name
    product.outputs[0].shape = ir.Shape([*first.outputs[0].shape[:-1], merged.shape[0]])
    for value, like in ((transpose.outputs[0], merged), (product.outputs[0], first.outputs[0])):
        if like.dtype is not None:
            value.dtype = like.dtype
    return product.outputs[0]


def _heads(linear: Linear) -> tuple[ir.Node, int, int] | None:
    """The transpose [B, heads, T, h] that follows a projection, and heads and h."""
    readers = users(linear.output)
    if len(readers) != 1 or readers[0].op_type != "Reshape":
        return None
    reshaped = readers[0].outputs[0]
    follows = users(reshaped)
    if len(follows) != 1 or follows[0].op_type != "Transpose" or reshaped.shape is None:
        return None
    transpose = follows[0]
    if list(transpose.attributes["perm"].as_ints()) != [0, 2, 1, 3] or len(reshaped.shape) != 4:
        return None
    heads, width = reshaped.shape[2], last_dim(reshaped)
    return None if not isinstance(heads, int) or width is None else (transpose, heads, width)


def merge_projections(model: ir.Model) -> int:
    """Merges the projections of every layer; returns how many layers."""
    graph = model.graph
    count = 0
    for linears in linears_by_input(graph).values():
        heads = [_heads(linear) for linear in linears]
        if len(linears) != 3 or not mergeable(linears) or any(found is None for found in heads):
            continue
        found = [item for item in heads if item is not None]
        width = found[0][2]
        if any(item[2] != width for item in found):
            continue
        prefix = str(linears[0].weight.name).rsplit(".", 2)[0]
        merged = merge_weights(graph, linears, f"{prefix}.qkv_proj.weight")
        product = insert_product(linears, merged)
        _split_heads(graph, product, [(node, count_) for node, count_, _ in found], width, prefix)
        count += 1
    return count


def _split_heads(
    graph: ir.Graph, product: ir.Value, outputs: Sequence[tuple[ir.Node, int]], width: int, prefix: str
) -> None:
    """Reshapes the product to heads and splits it for the values that were the transposes' outputs."""
    total = sum(heads for _, heads in outputs)
    shape = constant_node([0, 0, total, width], f"{prefix}.heads_shape")
    sizes = constant_node([heads for _, heads in outputs], f"{prefix}.heads_sizes")
    reshape = ir.node("Reshape", [product, shape.outputs[0]])
    transpose = ir.node("Transpose", [reshape.outputs[0]], attributes={"perm": [0, 2, 1, 3]})
    split = ir.node(
        "Split", [transpose.outputs[0], sizes.outputs[0]], attributes={"axis": 1}, num_outputs=len(outputs)
    )
    anchor = product.producer()
    assert anchor is not None
    if product.dtype is not None:
        reshape.outputs[0].dtype = transpose.outputs[0].dtype = product.dtype
    graph.insert_after(anchor, [shape, sizes, reshape, transpose, split])
    for (old, _), new in zip(outputs, split.outputs, strict=True):
        stand_in(new, old.outputs[0])
        old.outputs[0].replace_all_uses_with(new)
        reshaped = old.inputs[0]
        assert reshaped is not None
        before = reshaped.producer()
        assert before is not None
        graph.remove(old, safe=True)
        graph.remove(before, safe=True)


def constant_node(values: list[int], name: str) -> ir.Node:
    """An int64 Constant."""
    node = ir.node("Constant", [], attributes={"value": ir.tensor(values, name=name)})
    node.outputs[0].name = name
    node.outputs[0].const_value = node.attributes["value"].as_tensor()
    node.outputs[0].shape = ir.Shape([len(values)])
    node.outputs[0].dtype = ir.DataType.INT64
    assert constant(node.outputs[0]) is not None
    return node
