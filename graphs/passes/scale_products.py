"""For TensorRT: a product that leaves fp16 is computed in fp16, on a fraction of its input.

    MatMul(x, Wᵀ)  →  MatMul(x · 2⁻⁸, Wᵀ) · 2⁸

In fp32 the product would need its weight in fp32: TensorRT casts it when it builds an engine, and stores the
result, once for each profile. Multiplied with a power of two, x and the product keep their digits, and stay
in the range up to 65504 · 2⁸. What is read and what comes out is in fp32 where it was to be: `half_precision`
knows both by their names.

Illegal, and left alone, when:
  (1) neither the product nor what it reads is among the values that leave fp16;
  (2) the weight itself leaves fp16, and is stored in fp32;
  (3) the weight is stored as codes: of those TensorRT makes numbers of any format while it multiplies;
  (4) the product is queries, keys and values: keys may be as small as queries are large, and would lose their
      digits. Attention itself is in fp32 then, and nothing is gained.
"""

from collections.abc import Collection

import onnx_ir as ir

from gemma_export.graphs.passes.merge_projections import find_linear
from gemma_export.graphs.passes.patterns import stand_in
from gemma_export.graphs.passes.quantized_layers import add_constant

HEADS = ".qkv_proj.weight"
STEP = 2.0**-8
"""What x is multiplied with. An x below 2⁻⁶ loses digits, but none above 2⁻¹⁷."""


def scale_products(model: ir.Model, keep: Collection[str]) -> int:
    """Scales every product of numbers that leaves fp16; returns how many.

    Args:
        model: The graph before its formats are chosen, all in fp32.
        keep: Names of the values and initializers that leave fp16.
    """
    count = 0
    for node in list(model.graph):
        linear = find_linear(node)
        if linear is None or linear.weight.name in keep or str(linear.weight.name).endswith(HEADS):
            continue
        if linear.output.name in keep or _name_before_reshapes(node.inputs[0]) in keep:
            _scale(model.graph, node)
            count += 1
    return count


def _name_before_reshapes(value: ir.Value | None) -> str | None:
    """The name of what a value says again in another shape."""
    producer = None if value is None else value.producer()
    if producer is not None and producer.op_type in ("Reshape", "Transpose"):
        return _name_before_reshapes(producer.inputs[0])
    return None if value is None else value.name


def _scale(graph: ir.Graph, product: ir.Node) -> None:
    x, result = product.inputs[0], product.outputs[0]
    assert x is not None
    less = ir.node("Mul", [x, add_constant(graph, "scale_down", STEP)], name=f"{result.name}.scaled_input")
    stand_in(less.outputs[0], x)
    less.outputs[0].name = less.name
    more = ir.node("Mul", [result, add_constant(graph, "scale_up", 1 / STEP)], name=result.name)
    output = more.outputs[0]
    stand_in(output, result)
    result.replace_all_uses_with(output, replace_graph_outputs=True)
    more.replace_input_with(0, result)
    product.replace_input_with(0, less.outputs[0])
    result.name = product.name = f"{output.name}.unscaled"
    graph.insert_before(product, less)
    graph.insert_after(product, more)
