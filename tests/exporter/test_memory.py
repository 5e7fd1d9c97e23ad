import torch
from support.memory import anonymous, needs_linux

from gemma_export.exporter.memory import give_back_large_blocks

BLOCK = 2**20  # numbers of 4 bytes


@needs_linux
def test_large_blocks_go_back_whatever_lies_between_them() -> None:
    torch.ones(4 * BLOCK)  # glibc then takes blocks up to this size from its heap.
    give_back_large_blocks()
    before = anonymous()
    blocks, between = [], []
    for _ in range(10):
        blocks.append(torch.ones(BLOCK))
        between.append(torch.ones(2**12))
    held = anonymous()
    assert held - before > 9 * 4 * BLOCK
    blocks.clear()
    assert anonymous() - before < 2 * 4 * BLOCK
    assert all(one.all() for one in between)
