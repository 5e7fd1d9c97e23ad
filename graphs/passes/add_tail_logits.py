"""For drafts that are verified in one step: the logits of its last tokens, on request.

    Slice(x, [-1]) → norm → head → logits [B, 1, V]
        →  Slice(x, tail_start) → norm → head → tail_logits [B, N, V] → Slice(·, [-1]) → logits [B, 1, V]

`tail_start` is an input with a default: -N asks for the last N tokens, and who does not know it gets the last
one, as before. There is one head, so there is one copy of its weights.

Illegal when the graph gives the logits of all tokens: nothing is cut off before the head.
"""

from collections.abc import Iterator

import onnx_ir as ir

from gemma_export.errors import GraphError
from gemma_export.graphs.passes.patterns import ints, stand_in
from gemma_export.runtime.backend import LOGITS, TAIL_LOGITS, TAIL_START

_LAST = [-1]


def add_tail_logits(model: ir.Model) -> int:
    """Adds the input `tail_start` and the output `tail_logits` behind all others; returns 1.

    Args:
        model: A lowered graph with the logits of the last token.

    Raises:
        GraphError: It has others.
    """
    graph = model.graph
    logits = graph.outputs[0]
    *head, cut = _back_to_the_cut(logits)
    last = ir.node("Slice", [logits, *cut.inputs[1:]])
    stand_in(last.outputs[0], logits)
    graph.append(last)
    start = ir.Value(
        name=TAIL_START,
        shape=ir.Shape([len(_LAST)]),
        type=ir.TensorType(ir.DataType.INT64),
        const_value=ir.tensor(_LAST, dtype=ir.DataType.INT64, name=TAIL_START),
    )
    cut.replace_input_with(1, start)
    graph.register_initializer(start)
    graph.inputs.append(start)
    for node in (*head, cut):
        (value,) = node.outputs
        assert value.shape is not None
        value.shape = ir.Shape([value.shape[0], "tail", value.shape[2]])
    logits.name, last.outputs[0].name = TAIL_LOGITS, LOGITS
    graph.outputs[0] = last.outputs[0]
    graph.outputs.append(logits)
    return 1


def _back_to_the_cut(logits: ir.Value) -> Iterator[ir.Node]:
    """The nodes from the logits back to the one that leaves the last token."""
    value: ir.Value | None = logits
    while value is not None and (node := value.producer()) is not None:
        yield node
        if node.op_type == "Slice" and ints(node.inputs[1]) == _LAST:
            return
        value = node.inputs[0]
    raise GraphError(
        "The graph gives other logits than the last token's.",
        "The traced graph has another form than the pass knows: this is a defect, please report it.",
    )
