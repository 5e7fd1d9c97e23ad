"""A process that tells how fast memory is read: that it answers, is asked, and ends."""

import os

import pytest

from gemma_export.errors import GemmaExportError
from gemma_export.exporter.bench.processes import own_peak
from gemma_export.exporter.bench.reading import Reading


def test_it_answers_each_time_and_leaves_nothing_behind() -> None:
    before = own_peak()
    with Reading(1) as reading:
        rates = [reading.rate() for _ in range(3)]
        process = reading._process.pid
    assert all(rate > 0 for rate in rates)
    assert own_peak() - before < 100 << 20  # Its buffer has 256 MiB at least.
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)


def test_one_that_has_ended_is_missed() -> None:
    with Reading(1) as reading:
        reading._process.kill()
        reading._process.wait()
        with pytest.raises(GemmaExportError, match="how fast memory is read"):
            reading.rate()


def test_it_has_begun_before_anything_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Reading] = []
    monkeypatch.setattr(Reading, "rate", lambda self: asked.append(self))
    with Reading(1) as reading:
        assert asked == [reading]
