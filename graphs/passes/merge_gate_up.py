"""Gate and up projections of a layer become one product over one weight.

    Gelu(x·Wgᵀ) · (x·Wuᵀ)  →  gate, up = Split(x · [Wg; Wu]ᵀ);  Gelu(gate) · up

Illegal when:
  (1) the two do not read the same x, or are not equally wide;
  (2) a weight is not stored, has another use, or the formats differ;
  (3) the first is not what goes through the activation: swapped halves would still type-check.
"""

import onnx_ir as ir

from gemma_export.graphs.passes.merge_projections import (
    Linear,
    insert_product,
    linears_by_input,
    merge_weights,
    mergeable,
)
from gemma_export.graphs.passes.patterns import stand_in, users


def _gate_first(linears: list[Linear]) -> tuple[Linear, Linear] | None:
    """The two linears as (gate, up), or None where they are not a gated pair."""
    gates = [linear for linear in linears if _is_gate(linear)]
    ups = [linear for linear in linears if not _is_gate(linear)]
    if len(gates) != 1 or len(ups) != 1 or gates[0].tensor.source.shape != ups[0].tensor.source.shape:
        return None
    activated = users(gates[0].output)[0].outputs[0]
    together = set(users(activated)) & set(users(ups[0].output))
    return (gates[0], ups[0]) if together else None


def _is_gate(linear: Linear) -> bool:
    readers = users(linear.output)
    return len(readers) == 1 and readers[0].op_type == "Gelu"


def merge_gate_up(model: ir.Model) -> int:
    """Merges the pair of every layer; returns how many layers."""
    graph = model.graph
    count = 0
    for linears in linears_by_input(graph).values():
        pair = _gate_first(linears) if len(linears) == 2 and mergeable(linears) else None
        if pair is None:
            continue
        prefix = str(pair[0].weight.name).rsplit(".", 2)[0]
        product = insert_product(
            sorted(pair, key=linears.index), merge_weights(graph, pair, f"{prefix}.gate_up_proj.weight")
        )
        split = ir.node("Split", [product], attributes={"axis": -1, "num_outputs": 2}, num_outputs=2)
        anchor = product.producer()
        assert anchor is not None
        graph.insert_after(anchor, split)
        for linear, new in zip(pair, split.outputs, strict=True):
            old = linear.output
            stand_in(new, old)
            old.replace_all_uses_with(new)
            graph.remove(linear.product, safe=True)
        count += 1
    return count
