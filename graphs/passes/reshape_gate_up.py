"""For TensorRT: gate and up get an axis of their own before they are split.

    gate, up = Split(product [.., 2·f], last axis)
        →  Split(Reshape(product, [.., 2, f]), last axis but one), each half reshaped to [.., f]

Where a product is split along its last axis TensorRT may cut the weight instead, and does so for one profile
and not for the other: 16-bit weights of gate and up are then stored once for each. No number is moved: the
halves lie one behind the other in each token.

Illegal when:
  (1) what is split is not the product with a stored weight, along its last axis;
  (2) it is not split into two halves.
"""

import onnx_ir as ir

from gemma_export.graphs.passes.merge_projections import find_linear
from gemma_export.graphs.passes.patterns import last_dim, stand_in
from gemma_export.graphs.passes.quantized_layers import add_constant


def reshape_gate_up(model: ir.Model) -> int:
    """Rewrites the split of every merged pair; returns how many (one a layer)."""
    splits = [node for node in model.graph if _splits_a_pair(node)]
    for node in splits:
        _split_pair(model.graph, node)
    return len(splits)


def _splits_a_pair(node: ir.Node) -> bool:
    """Whether a node halves the product [.., 2·f] with a stored weight along its last axis."""
    product = node.inputs[0] if node.op_type == "Split" else None
    if product is None or find_linear(product.producer()) is None or product.shape is None:
        return False
    width = last_dim(product)
    along_last = node.attributes.get_int("axis", 0) in (-1, len(product.shape) - 1)
    return along_last and width is not None and [last_dim(half) for half in node.outputs] == [width // 2] * 2


def _split_pair(graph: ir.Graph, split: ir.Node) -> None:
    """Puts what does the same between a product and what reads its halves."""
    product = split.inputs[0]
    assert product is not None
    assert product.shape is not None
    *tokens, width = product.shape
    assert isinstance(width, int)
    half = width // 2
    pair = _reshape(graph, product, [*tokens, 2, half], len(tokens))
    halves = ir.node(
        "Split", [pair.outputs[0]], attributes={"axis": len(tokens), "num_outputs": 2}, num_outputs=2
    )
    nodes = [pair, halves]
    for old, new in zip(split.outputs, halves.outputs, strict=True):
        _describe(new, f"{old.name}.pair", [*tokens, 1, half], product.dtype)
        flat = _reshape(graph, new, [*tokens, half], len(tokens))
        stand_in(flat.outputs[0], old)
        old.replace_all_uses_with(flat.outputs[0])
        nodes.append(flat)
    graph.insert_after(split, nodes)
    graph.remove(split, safe=True)


def _reshape(graph: ir.Graph, value: ir.Value, shape: list[int | ir.SymbolicDim], copied: int) -> ir.Node:
    """Reshapes a value; so many axes are copied, those of its tokens."""
    sizes = [*[0] * copied, *(size for size in shape[copied:] if isinstance(size, int))]
    name = f"shape_{'_'.join(map(str, sizes))}"
    node = ir.node("Reshape", [value, add_constant(graph, name, sizes, ir.DataType.INT64)])
    _describe(node.outputs[0], f"{value.name}.pair", shape, value.dtype)
    return node


def _describe(
    value: ir.Value, name: str, shape: list[int | ir.SymbolicDim], dtype: ir.DataType | None
) -> None:
    value.name, value.shape = name, ir.Shape(shape)
    if dtype is not None:
        value.dtype = dtype
