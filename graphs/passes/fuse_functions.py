"""For onnxruntime on a CPU: small operators become calls of functions, which our kernels compute at once.

    gate, up = Split(x);  Gelu(gate) · up            →  GatedGelu(x)
    sum = Add(stream, added);  RMSNormalization(sum) →  sum, normed = ResidualNorm(stream, added, gain)

The functions are defined in the graph itself, by the operators that were there: a runtime without our kernels
replaces a call by what the function is made of, and computes what it did before. With them, a layer has three
operators beside its products and its attention where it had seven, and most of their time is that of starting
them.

Left as it is:
  (1) a split into other than two halves of the last axis, another Gelu, or halves that something else reads;
  (2) a norm of something else than a sum of two equal shapes: the head's is of the last tokens of one.
"""

import onnx_ir as ir

from gemma_export.graphs.passes.patterns import stand_in, users

DOMAIN = "gemma_export"
"""Of the functions, and of the kernels that take their place."""


def fuse_gated_gelu(model: ir.Model) -> int:
    """Fuses the activation of every layer's MLP; returns how many."""
    count = 0
    for split in [node for node in model.graph if node.op_type == "Split"]:
        found = _activation(split)
        if found is None:
            continue
        gelu, product = found
        call = ir.node("GatedGelu", [split.inputs[0]], domain=DOMAIN)
        _replace(model, [split, gelu, product], call, {product.outputs[0]: call.outputs[0]})
        count += 1
    if count:
        _define(model, _gated_gelu())
    return count


def fuse_residual_norm(model: ir.Model) -> int:
    """Fuses every RMSNorm with the sum that it is of; returns how many."""
    count = 0
    for norm in [node for node in model.graph if node.op_type == "RMSNormalization"]:
        value, gain = norm.inputs
        assert value is not None
        add = value.producer()
        if (
            add is None
            or add.op_type != "Add"
            or any(x is None or x.shape != value.shape for x in add.inputs)
        ):
            continue
        epsilon = norm.attributes.get_float("epsilon", 1e-5)
        call = ir.node(
            "ResidualNorm", [*add.inputs, gain], {"epsilon": epsilon}, domain=DOMAIN, num_outputs=2
        )
        _replace(model, [add, norm], call, dict(zip([value, norm.outputs[0]], call.outputs, strict=True)))
        count += 1
    if count:
        _define(model, _residual_norm())
    return count


def _activation(split: ir.Node) -> tuple[ir.Node, ir.Node] | None:
    """The Gelu and the product that read the halves of a split, and alone do."""
    if len(split.outputs) != 2 or split.attributes.get_int("axis", 0) != -1:
        return None
    gate, up = split.outputs
    gelus, products = users(gate), users(up)
    if len(gelus) != 1 or len(products) != 1:
        return None
    gelu, product = gelus[0], products[0]
    approximate = gelu.attributes.get_string("approximate", "none")
    if gelu.op_type != "Gelu" or approximate != "tanh" or users(gelu.outputs[0]) != [product]:
        return None
    return (gelu, product) if product.op_type == "Mul" else None


def _replace(model: ir.Model, old: list[ir.Node], call: ir.Node, values: dict[ir.Value, ir.Value]) -> None:
    """Puts a call in the place of nodes, the last of which is where all that it reads has been computed."""
    model.graph.insert_before(old[-1], call)
    for before, after in values.items():
        stand_in(after, before)
        before.replace_all_uses_with(after, replace_graph_outputs=True)
        before.name = f"{after.name}.replaced"
    call.name = call.outputs[-1].name
    model.graph.remove(old, safe=True)


def _define(model: ir.Model, function: ir.Function) -> None:
    model.opset_imports[DOMAIN] = 1
    for domain, version in model.opset_imports.items():
        if domain == "":
            function.graph.opset_imports[domain] = version
    model.functions[function.identifier()] = function


def _gated_gelu() -> ir.Function:
    x = ir.Value(name="x")
    split = ir.node("Split", [x], {"axis": -1, "num_outputs": 2}, num_outputs=2)
    gelu = ir.node("Gelu", [split.outputs[0]], {"approximate": "tanh"})
    product = ir.node("Mul", [gelu.outputs[0], split.outputs[1]])
    return _function("GatedGelu", [x], [product.outputs[0]], [split, gelu, product])


def _residual_norm() -> ir.Function:
    stream, added, gain = (ir.Value(name=name) for name in ("stream", "added", "gain"))
    add = ir.node("Add", [stream, added])
    norm = ir.node("RMSNormalization", [add.outputs[0], gain], {"axis": -1})
    norm.attributes["epsilon"] = ir.RefAttr("epsilon", "epsilon", ir.AttributeType.FLOAT)
    outputs = [add.outputs[0], norm.outputs[0]]
    attributes = [ir.Attr("epsilon", ir.AttributeType.FLOAT, None)]
    return _function("ResidualNorm", [stream, added, gain], outputs, [add, norm], attributes)


def _function(
    name: str,
    inputs: list[ir.Value],
    outputs: list[ir.Value],
    nodes: list[ir.Node],
    attributes: list[ir.Attr] | None = None,
) -> ir.Function:
    for node in nodes:
        for i, value in enumerate(node.outputs):
            value.name = f"{node.op_type.lower()}_{i}"
    graph = ir.Graph(inputs, outputs, nodes=nodes, name=name)
    return ir.Function(DOMAIN, name, graph=graph, attributes=attributes or [])
