"""A target shape that is computed from the operand's own shape becomes a constant.

    Reshape(x [B, T, H, h], Concat(B, T, [H·h]))  →  Reshape(x, [0, 0, H·h])

where 0 copies the axis of x at that place. Nothing is then left of the tracer's arithmetic on shapes.

Illegal when an element of the shape is neither a constant nor the size of x's axis at the same place.
"""

import onnx_ir as ir

from gemma_export.graphs.passes.patterns import constant, ints, stand_in


def fold_reshape(model: ir.Model) -> int:
    """Folds every such shape; returns how many."""
    count = 0
    for node in [node for node in model.graph if node.op_type == "Reshape"]:
        shape = node.inputs[1]
        if shape is None or node.inputs[0] is None or constant(shape) is not None:
            continue
        sizes = _copied_or_constant(node.inputs[0], node.outputs[0], shape)
        if sizes is None:
            continue
        name = f"shape_{'_'.join(map(str, sizes))}"
        value = model.graph.initializers.get(name)
        if value is None:
            value = ir.Value(
                name=name,
                shape=ir.Shape([len(sizes)]),
                type=ir.TensorType(ir.DataType.INT64),
                const_value=ir.tensor(sizes, dtype=ir.DataType.INT64, name=name),
            )
            model.graph.register_initializer(value)
        replacement = ir.node("Reshape", [node.inputs[0], value])
        new, old = replacement.outputs[0], node.outputs[0]
        stand_in(new, old)
        model.graph.insert_before(node, replacement)
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        model.graph.remove(node, safe=True)
        count += 1
    return count


def _copied_or_constant(operand: ir.Value, output: ir.Value, shape: ir.Value) -> list[int] | None:
    """The shape with 0 for every axis that is copied, or None where an element is something else."""
    producer = shape.producer()
    if producer is None or producer.op_type != "Concat" or operand.shape is None or output.shape is None:
        return None
    sizes: list[int] = []
    for axis, part in enumerate(producer.inputs):
        known = ints(part)
        if known is not None and len(known) == 1:
            sizes.append(known[0])
        elif axis < len(operand.shape) and operand.shape[axis] == output.shape[axis]:
            sizes.append(0)
        else:
            return None
    return sizes
