"""How exactly torch multiplies matrices of fp32."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch


@contextmanager
def matmul_precision(precision: Literal["highest", "medium"]) -> Iterator[None]:
    """Sets the precision of torch's products while the body runs.

    `medium` lets torch round the operands to bfloat16, which leaves three digits of each, where the CPU
    multiplies those faster; elsewhere it takes oneDNN's products instead of MKL's, which are of the same
    precision and on AMD's processors twice as fast. It is for what looks at activations, not at results.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
