"""What must hold of a graph for onnxruntime's CUDA provider: a CPU's rules, and a kernel for every operator.

One without would be computed on the CPU, with its operands fetched from the device and its results
brought back in every step, and nothing would say so.
"""

from collections.abc import Mapping

import onnx_ir as ir

from gemma_export.graphs import spec
from gemma_export.graphs.formats import Form

_HALVES = frozenset({ir.DataType.FLOAT16, ir.DataType.BFLOAT16})
_FLOATS = _HALVES | {ir.DataType.FLOAT}
_COUNTS = frozenset({ir.DataType.INT32, ir.DataType.INT64})

KERNELS: Mapping[str, frozenset[ir.DataType]] = {
    "Add": _FLOATS,
    "Cast": _FLOATS | _COUNTS | {ir.DataType.UINT8},
    "Div": _FLOATS,
    "FusedMatMul": _FLOATS,
    "Gather": _FLOATS | _COUNTS | {ir.DataType.UINT8},
    "Gelu": _FLOATS,
    "GroupQueryAttention": _HALVES,
    "MatMulNBits": _FLOATS,
    "Mul": _FLOATS,
    "RMSNormalization": _FLOATS,
    "Reshape": _FLOATS,
    "Slice": _FLOATS,
    "Split": _FLOATS,
    "Sub": _FLOATS,
    "Tanh": _FLOATS,
    "Unsqueeze": _FLOATS,
}
"""The operators of a lowered graph, and the formats of the first operand that have a kernel.

Seen with onnxruntime-gpu 1.31.1: each alone in a graph, loaded with `session.disable_cpu_ep_fallback`. For
MatMulNBits with 4 and 8 bits and blocks of 16, 32, 64, 128 and 256 columns, and for GroupQueryAttention also
with a window and a soft-cap. `docs/OperatorKernels.md` of onnxruntime is the list of all.
"""


def every_operator_has_a_cuda_kernel(model: ir.Model) -> str | None:
    """None would be computed on the CPU. What is made of stored values only is, but once, at load."""
    constant = set(model.graph.initializers.values())
    for node in model.graph:
        operands = [value for value in node.inputs if value is not None]
        if all(value in constant for value in operands):
            constant.update(node.outputs)
            continue
        for value in (operands[0], node.outputs[0]):
            if value.dtype not in KERNELS.get(node.op_type, frozenset()):
                return f"there is none for {node.op_type} of {value.dtype} ({node.outputs[0].name})"
    return None


_OPERATORS = (spec.norms_and_activations_are_all_there, every_operator_has_a_cuda_kernel)
CUDA = spec.Spec("onnxruntime CUDA", (*spec.FLOATS, *_OPERATORS))


def cuda_quantized(forms: Mapping[str, Form]) -> spec.Spec:
    """The rules of a quantized CUDA graph, and that its products have the forms chosen for them, by name."""
    return spec.Spec("quantized CUDA", (*spec.CODES, spec.forms_are_those_chosen(forms), *_OPERATORS))
