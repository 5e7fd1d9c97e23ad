"""A graph for onnxruntime's CUDA provider becomes one that `emulate_half` can round as a GPU does.

    FusedMatMul(x, W)                    →  MatMul(x, Transpose(W))
    MatMulNBits(x, codes, scales)        →  Concat(MatMul(x, Transpose(DequantizeLinear(rows of codes))), …)
    GroupQueryAttention(qkv, …, cos, sin)
        →  q, k, v = Split(qkv)
           GroupQueryAttention(RotaryEmbedding(q), RotaryEmbedding(k), v, …)

A GPU rounds what stands between the parts: the rotated queries and keys, which the cache keeps, and the
numbers that it makes of codes. On a CPU, MatMulNBits would round x instead, or take a second for a product.

Codes are read where they lie in the file, in as many rows as have `most` numbers.

Illegal, and an error, when codes are not stored, or have zero points.

Source: onnxruntime `docs/ContribOperators.md`.
"""

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from gemma_export.errors import GraphError
from gemma_export.graphs.passes.quantized_layers import add_constant, take_place
from gemma_export.graphs.passes.rows_at_a_time import MOST_NUMBERS
from gemma_export.graphs.spec import MICROSOFT

CODES = {4: ir.DataType.UINT4, 8: ir.DataType.UINT8}
"""The format of MatMulNBits's codes by their bits; the code of zero is in the middle."""


def unfuse(model: ir.Model, most: int = MOST_NUMBERS) -> int:
    """Rewrites the operators above; returns how many.

    Args:
        model: A lowered graph, as it is read from its file.
        most: Numbers of a weight that are made of codes at once.

    Raises:
        GraphError: There are codes that are not stored, or have zero points.
    """
    graph = model.graph
    count = 0
    for node in list(graph):
        if node.domain != MICROSOFT:
            continue
        match node.op_type:
            case "FusedMatMul":
                _transpose(graph, node)
            case "MatMulNBits":
                _dequantize(graph, node, most)
            case "GroupQueryAttention":
                _rotate(graph, node)
            case _:
                continue
        count += 1
    return count


def _transpose(graph: ir.Graph, fused: ir.Node) -> None:
    x, weight = fused.inputs
    assert weight is not None
    product = _product(graph, fused, x, weight)
    take_place(graph, fused, product)


def _dequantize(graph: ir.Graph, fused: ir.Node, most: int) -> None:
    x, codes, scales = fused.inputs[:3]
    assert x is not None
    assert x.dtype is not None
    assert codes is not None
    assert scales is not None
    if codes.const_value is None or any(fused.inputs[3:]):
        raise GraphError(
            f"{codes.name} cannot be measured: its codes are not stored, or have zero points.",
            "This is a defect of a graph pass: please report it.",
        )
    rows, columns = fused.attributes["N"].as_int(), fused.attributes["K"].as_int()
    bits, block = fused.attributes["bits"].as_int(), fused.attributes["block_size"].as_int()
    step = max(1, most // columns)
    parts = []
    for start in range(0, rows, step):
        count = min(step, rows - start)
        piece = _rows(graph, codes, start, (count, columns), bits)
        zero = _zeros(graph, f"{piece.name}.zero", (count, columns // block), bits)
        steps = scales if count == rows else _slice(graph, fused, scales, start, count)
        numbers = _insert(
            graph,
            fused,
            "DequantizeLinear",
            [piece, steps, zero],
            f"{piece.name}.numbers",
            (count, columns),
            x.dtype,
            axis=1,
            block_size=block,
        )
        parts.append(_product(graph, fused, x, numbers))
    if len(parts) == 1:
        take_place(graph, fused, parts[0])
        return
    concat = ir.node("Concat", [part.outputs[0] for part in parts], attributes={"axis": -1})
    for part, start in zip(parts, range(0, rows, step), strict=True):
        part.outputs[0].name, part.outputs[0].dtype = f"{fused.outputs[0].name}.{start}", x.dtype
    graph.insert_before(fused, concat)
    take_place(graph, fused, concat)


def _rotate(graph: ir.Graph, fused: ir.Node) -> None:
    packed, cos, sin = fused.inputs[0], fused.inputs[7], fused.inputs[8]
    past_key, positions = fused.inputs[3], graph.inputs[1]
    assert packed is not None
    assert packed.dtype is not None
    assert past_key is not None
    assert past_key.shape is not None
    name, dtype = str(fused.outputs[0].name), packed.dtype
    heads = [fused.attributes[key].as_int() for key in ("num_heads", "kv_num_heads", "kv_num_heads")]
    head_dim = past_key.shape[3]
    assert isinstance(head_dim, int)
    sizes = add_constant(graph, "sizes_of_heads", [count * head_dim for count in heads], ir.DataType.INT64)
    split = ir.node("Split", [packed, sizes], attributes={"axis": -1}, num_outputs=3)
    graph.insert_before(fused, split)
    tokens = list(packed.shape[:2]) if packed.shape is not None else []
    for output, part, count in zip(split.outputs, ("query", "key", "value"), heads, strict=True):
        output.name, output.dtype = f"{name}.{part}", dtype
        output.shape = ir.Shape([*tokens, count * head_dim])
    rotated = [
        _insert(
            graph,
            fused,
            "RotaryEmbedding",
            [value, cos, sin, positions],
            f"{value.name}.rotated",
            value.shape,
            dtype,
            num_heads=count,
        )
        for value, count in zip(split.outputs[:2], heads, strict=False)
    ]
    attributes = [value for key, value in fused.attributes.items() if key != "do_rotary"]
    attention = ir.Node(
        MICROSOFT,
        "GroupQueryAttention",
        [*rotated, split.outputs[2], *fused.inputs[3:7]],
        attributes,
        num_outputs=3,
    )
    graph.insert_before(fused, attention)
    for new, old in zip(attention.outputs[1:], fused.outputs[1:], strict=True):
        new.shape, new.type = old.shape, old.type
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        new.name, old.name = old.name, f"{old.name}.replaced"
    take_place(graph, fused, attention)


def _product(graph: ir.Graph, before: ir.Node, x: ir.Value | None, weight: ir.Value) -> ir.Node:
    """The product of x [.., K] with the transpose of a weight [N, K]."""
    assert weight.dtype is not None
    columns = None if weight.shape is None else tuple(reversed(weight.shape))
    transposed = _insert(
        graph,
        before,
        "Transpose",
        [weight],
        f"{weight.name}.transposed",
        columns,
        weight.dtype,
        perm=[1, 0],
    )
    product = ir.node("MatMul", [x, transposed])
    graph.insert_before(before, product)
    return product


def _rows(graph: ir.Graph, codes: ir.Value, start: int, shape: tuple[int, int], bits: int) -> ir.Value:
    """Some rows of stored codes [N, G, ..] as another initializer [rows, K], over the same bytes."""
    name, stored, dtype = f"{codes.name}.{start}", codes.const_value, CODES[bits]
    assert stored is not None
    tensor: ir.TensorProtocol
    if isinstance(stored, ir.ExternalTensor):
        row_bytes = stored.nbytes // stored.shape.numpy()[0]
        tensor = ir.ExternalTensor(
            stored.location,
            (stored.offset or 0) + start * row_bytes,
            shape[0] * row_bytes,
            dtype,
            shape=ir.Shape(shape),
            name=name,
            base_dir=stored.base_dir,
        )
    else:  # So small that it stands in the graph itself.
        rows = stored.numpy()[start : start + shape[0]]
        numbers = rows if bits == 8 else np.stack([rows & 15, rows >> 4], axis=-1)
        tensor = ir.Tensor(numbers.reshape(shape).astype(dtype.numpy()), name=name)
    value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


def _zeros(graph: ir.Graph, name: str, shape: tuple[int, int], bits: int) -> ir.Value:
    """The code of zero for each block."""
    numbers = np.full(shape, 1 << (bits - 1), np.uint8)
    tensor = ir.Tensor(numbers.astype(CODES[bits].numpy()), name=name)
    value = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


def _slice(graph: ir.Graph, before: ir.Node, scales: ir.Value, start: int, count: int) -> ir.Value:
    bounds = [add_constant(graph, f"row_{n}", [n], ir.DataType.INT64) for n in (start, start + count)]
    axis = add_constant(graph, "axis_of_rows", [0], ir.DataType.INT64)
    assert scales.dtype is not None
    shape = None if scales.shape is None else (count, *scales.shape[1:])
    return _insert(
        graph, before, "Slice", [scales, *bounds, axis], f"{scales.name}.{start}", shape, scales.dtype
    )


def _insert(
    graph: ir.Graph,
    before: ir.Node,
    op_type: str,
    inputs: Sequence[ir.Value | None],
    name: str,
    shape: Sequence[int | ir.SymbolicDim] | ir.Shape | None,
    dtype: ir.DataType,
    **attributes: int | list[int],
) -> ir.Value:
    """A node of one output before another."""
    node = ir.node(op_type, inputs, attributes=attributes, name=name)
    graph.insert_before(before, node)
    value = node.outputs[0]
    value.name, value.dtype = name, dtype
    value.shape = None if shape is None else ir.Shape(shape)
    return value
