"""For onnxruntime: the embedding table is stored once, in 8 bits, for the lookup and for the head.

    Gather(E, ids)             →  rows  = Gather(packed codes [V, G, b], ids)      uint8 [B, T, G, b]
                                  steps = Unsqueeze(Gather(scales [V, G], ids))    bfloat16 [B, T, G, 1]
                                  Reshape((Cast(rows) - 128) · Cast(steps))        fp32 [B, T, d]
    MatMul(x, Transpose(E))    →  MatMulNBits(x, packed codes, Cast(scales))

With a scale per row (fp32 [V, 1]) the steps are its own, for all of its blocks.

The layout is the one of MatMulNBits, whose rows are whole: only those that are looked up become numbers. The
factor sqrt(d) that follows the lookup stays an operator of its own: in the table, it would also multiply the
logits.

A table of the form `float` is left for `lower_linear` and `store_half`.

Illegal, and an error, when:
  (1) nothing says how the table is quantized, or something else than one lookup and one head reads it;
  (2) the form is another than w8, or the format one that MatMulNBits does not know;
  (3) the blocks do not divide the rows.
"""

from collections.abc import Mapping

import onnx_ir as ir

from gemma_export.errors import GraphError
from gemma_export.graphs.passes.merge_projections import Linear, find_linear
from gemma_export.graphs.passes.quantized_layers import (
    CALIBRATE,
    ROUNDS_X,
    StoredBlocks,
    add_blocks,
    add_constant,
    chosen,
    layer_name,
    lookup_tables,
    take_place,
)
from gemma_export.graphs.quantization import LinearQuantization
from gemma_export.graphs.quantized import GroupScales, PackedBlocks
from gemma_export.graphs.spec import MICROSOFT


def quantize_embedding(
    model: ir.Model, linears: Mapping[str, LinearQuantization], accuracy_level: int = ROUNDS_X
) -> int:
    """Quantizes the table with its lookup and its head, unless its form is `float`; returns how many tables.

    Args:
        model: With the lookup and the head as the canonical graph has them.
        linears: How, by name; `embed_tokens` is among them.
        accuracy_level: Of MatMulNBits.

    Raises:
        GraphError: The table cannot be quantized as said, for one of the reasons above.
    """
    graph = model.graph
    count = 0
    for table, lookup in lookup_tables(graph).items():
        name = layer_name(table)
        how = chosen(linears, name)
        if how.form == "float":
            continue
        if how.form != "w8":
            raise GraphError(
                f"{name} cannot be {how.form} for onnxruntime.",
                f"The embedding table has 8 bits and a scale per block. {CALIBRATE}",
            )
        head = _head(graph, name, table, lookup)
        stored = add_blocks(graph, name, head.tensor.source, how)
        _look_up(graph, lookup, stored)
        x = head.product.inputs[0]
        assert x is not None
        product = stored.insert_product(graph, head.product, x, accuracy_level)
        take_place(graph, head.product, product)
        count += 1
    if count:
        model.opset_imports[MICROSOFT] = 1
    return count


def _head(graph: ir.Graph, name: str, table: ir.Value, lookup: ir.Node) -> Linear:
    """The head, which is what reads a table beside its lookup."""
    heads = [linear for node in graph if (linear := find_linear(node)) is not None and linear.weight is table]
    others = {use.node for use in table.uses()} - {lookup}
    if len(heads) != 1 or len(others) != 1:
        raise GraphError(
            f"Beside its lookup, {name} is read by {len(others)} operators, {len(heads)} of them heads.",
            "This is a defect of a graph pass: please report it.",
        )
    return heads[0]


def _look_up(graph: ir.Graph, lookup: ir.Node, table: StoredBlocks) -> None:
    """Makes the rows that are looked up from their codes."""
    output, ids = lookup.outputs[0], lookup.inputs[1]
    assert output.shape is not None
    assert ids is not None
    name, tokens = str(output.name), list(output.shape[:-1])
    _, groups, block = PackedBlocks(table.weight).shape
    _, scales = GroupScales(table.weight).shape

    def insert(
        op_type: str, *inputs: ir.Value, called: str, sizes: list[int], dtype: ir.DataType, **attributes: int
    ) -> ir.Value:
        node = ir.node(op_type, inputs, attributes=attributes, name=f"{name}.{called}")
        graph.insert_before(lookup, node)
        value = node.outputs[0]
        value.name, value.shape, value.dtype = node.name, ir.Shape([*tokens, *sizes]), dtype
        return value

    uint8, stored, fp32 = ir.DataType.UINT8, table.scales.dtype, ir.DataType.FLOAT
    assert stored is not None
    zero = add_constant(graph, "zero_of_codes", 128.0)
    last_axis = add_constant(graph, "last_axis", [-1], ir.DataType.INT64)
    flat = add_constant(graph, "shape_of_rows", [0, 0, groups * block], ir.DataType.INT64)
    rows = insert("Gather", table.codes, ids, called="codes_of_rows", sizes=[groups, block], dtype=uint8)
    steps = insert("Gather", table.scales, ids, called="scales_of_rows", sizes=[scales], dtype=stored)
    steps = insert("Unsqueeze", steps, last_axis, called="stored_steps", sizes=[scales, 1], dtype=stored)
    if stored != fp32:
        steps = insert("Cast", steps, called="steps", sizes=[scales, 1], dtype=fp32, to=ir.DataType.FLOAT)
    numbers = insert("Cast", rows, called="numbers", sizes=[groups, block], dtype=fp32, to=ir.DataType.FLOAT)
    signed = insert("Sub", numbers, zero, called="signed", sizes=[groups, block], dtype=fp32)
    blocks = insert("Mul", signed, steps, called="blocks", sizes=[groups, block], dtype=fp32)
    reshape = ir.node("Reshape", [blocks, flat])
    graph.insert_before(lookup, reshape)
    take_place(graph, lookup, reshape)
