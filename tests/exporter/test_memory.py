"""In a process of its own: what other tests have freed would be taken first."""

import platform
import subprocess
import sys

from support.memory import needs_linux

MEBIBYTES = 40
SCRIPT = """
import torch
from gemma_export.exporter.memory import give_back_large_blocks
from support.memory import anonymous

torch.ones(2**22)  # glibc then takes blocks up to this size from its heap.
if {giving_back}:
    give_back_large_blocks()
before = anonymous()
blocks, between = [], []
for _ in range(10):
    blocks.append(torch.ones(2**20))
    between.append(torch.ones(2**12))
held = anonymous() - before
blocks.clear()
print(held >> 20, (anonymous() - before) >> 20, all(one.all() for one in between))
"""


def held_and_kept(giving_back: bool) -> tuple[int, int]:
    """Mebibytes of ten large blocks with small ones between them, and what is left after the large."""
    script = SCRIPT.format(giving_back=giving_back)
    out = subprocess.run(
        [sys.executable, "-c", script],
        check=True,
        capture_output=True,
        text=True,
        env={"PYTHONPATH": ":".join(sys.path)},
    ).stdout
    held, kept, whole = out.split()
    assert whole == "True"
    return int(held), int(kept)


@needs_linux
def test_large_blocks_go_back_whatever_lies_between_them() -> None:
    held, kept = held_and_kept(giving_back=True)
    assert held >= MEBIBYTES - 4
    assert kept < MEBIBYTES // 4
    if platform.libc_ver()[0] == "glibc":
        assert held_and_kept(giving_back=False)[1] > MEBIBYTES // 2, "Holes in a heap would not be seen."
