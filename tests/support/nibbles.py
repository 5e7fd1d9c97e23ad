"""Codes of 4 bits, taken out of the bytes that hold two each."""

import torch
from torch import Tensor


def unpack_nibbles(packed: Tensor) -> Tensor:
    """Codes of 4 bits (int8 [.., K]) from two to a byte (uint8 [.., K / 2])."""
    low, high = packed.bitwise_and(0xF), packed >> 4
    codes = torch.stack((low, high), -1).flatten(-2).view(torch.int8)
    return codes.bitwise_xor_(8).sub_(8)
