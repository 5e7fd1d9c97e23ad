"""How fast memory is read at a moment, told by a process that waits beside what is measured.

On a machine that others share, the rate may change by half within a second. So it is asked for before,
between and after the tokens that are held against it; its buffer is no memory of the process that runs these.
What it tells is the usual rate over a time about as long as a token's: neither the best of it, which a token
cannot hold, nor that of a moment in which the machine did something else.
`python -m gemma_export.exporter.bench.reading THREADS` writes a rate for each line that it reads.
"""

import subprocess
import sys
from contextlib import AbstractContextManager
from time import sleep
from types import TracebackType

from gemma_export.errors import GemmaExportError
from gemma_export.exporter.bench.machine import WAYS, Memory
from gemma_export.exporter.bench.processes import environment

SECONDS = 0.06
"""How long it reads each time."""
SETTLE = 0.02
"""How long it waits before: the threads that ran until then spin for a while."""
_TRIED = 0.2


class Reading(AbstractContextManager["Reading"]):
    """The process that reads; within the context it has begun, and reads nothing until it is asked.

    Args:
        threads: How many read together.
    """

    def __init__(self, threads: int) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment(),
        )

    def __enter__(self) -> "Reading":
        """Waits until it has found its way to read: what is measured beside it must not begin before."""
        self.rate()
        return self

    def rate(self) -> float:
        """Bytes per second, now.

        Raises:
            GemmaExportError: The process has ended.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write("\n")
            self._process.stdin.flush()
            return float(self._process.stdout.readline())
        except (OSError, ValueError):
            raise GemmaExportError(
                "The process that measures how fast memory is read has ended.",
                "Is there enough memory? It takes some 300 MB.",
            ) from None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Ends it."""
        self._process.kill()
        self._process.communicate()


def main() -> None:
    """Measures whenever a line comes."""
    with Memory(int(sys.argv[1])) as memory:
        how = max(WAYS, key=lambda way: memory.rate(way, _TRIED))
        for _ in sys.stdin:
            sleep(SETTLE)
            sys.stdout.write(f"{memory.usual_rate(how, SECONDS)}\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
