"""What SM 75 needs beside the graph.

Its kernels read 8-bit codes only where the other operand of the product is made by arithmetic. Behind a
reshape, as the heads of attention have one before `o_proj`, the whole weight is made 16-bit numbers in memory
first. An operation that changes no number is arithmetic too: the greater of x and the least finite number.
Everywhere else it would be a kernel for nothing, so it is no part of the graph.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from gemma_export.exporter.engines.engine_graph import CODES, WeightUse

_LEAST = np.finfo(np.float16).min


def keep_codes(trt: Any, network: Any, uses: Sequence[WeightUse]) -> list[Any]:
    """Puts the operation before every product of codes and 16-bit numbers that were reshaped.

    Args:
        trt: The module.
        network: Parsed; changed in place.
        uses: Of its weights.

    Returns:
        What must be kept until the network is compiled.
    """
    products = {use.operator for use in uses if use.type in CODES and not use.codes}
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    reshaped = {layer.get_output(0).name for layer in layers if layer.type == trt.LayerType.SHUFFLE}
    kept: list[Any] = []
    for layer in layers:
        if layer.type != trt.LayerType.MATRIX_MULTIPLY or layer.name not in products:
            continue
        operand = layer.get_input(0)
        if operand.name in reshaped and operand.dtype == trt.DataType.HALF:
            least = np.full([1] * len(operand.shape), _LEAST)
            constant = network.add_constant(least.shape, trt.Weights(least))
            greater = network.add_elementwise(operand, constant.get_output(0), trt.ElementWiseOperation.MAX)
            layer.set_input(0, greater.get_output(0))
            kept.append(least)
    return kept
