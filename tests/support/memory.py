"""What memory this process uses, where Linux says it."""

import gc
from pathlib import Path

import pytest

STATUS = Path("/proc/self/status")
needs_linux = pytest.mark.skipif(not STATUS.exists(), reason="only Linux says what memory is whose")


def anonymous() -> int:
    """Bytes of this process's memory that are no file's, without what other tests have left."""
    gc.collect()
    (line,) = [line for line in STATUS.read_text(encoding="utf-8").splitlines() if line.startswith("RssAnon")]
    return int(line.split()[1]) * 1024
