"""What people and programs are shown."""

import json
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from gemma_export.exporter.events import Listener, Note, StageFinished, StageProgress, StageStarted
from gemma_export.exporter.screen import JsonLines, Screen, bundle_table
from gemma_export.runtime.bundle import open_bundle


def tell(listener: Listener) -> None:
    listener(StageStarted("weights", "0.20 GB"))
    listener(StageProgress("weights", 50_000_000, 200_000_000, "bytes"))
    listener(Note("A weight [red] is kept."))
    listener(
        StageFinished("weights", 1.25, {"bytes": 200_000_000, "counts": {"hidden": 1}, "stop": [1, 107]})
    )


def test_without_a_terminal_there_are_lines_and_nothing_else() -> None:
    file = StringIO()
    screen = Screen(Console(file=file, width=80, soft_wrap=True))
    tell(screen)
    screen.close()
    assert file.getvalue().splitlines() == [
        "  · A weight [red] is kept.",
        "  ✓ weights         1.2 s  bytes 200.00 MB, stop [1, 107]",
    ]


@pytest.mark.parametrize(
    ("event", "shown"),
    [
        (None, "weights      ━━━━━━━━━━━━━━━━━━━━ 0.20 GB"),
        (StageProgress("weights", 50_000_000, 2_000_000_000, "bytes"), "0.05 of 2.00 GB"),
        (StageProgress("weights", 30, 1200, "tokens"), "30 of 1,200 tokens"),
    ],
    ids=["not known", "bytes", "tokens"],
)
def test_bar_on_a_terminal(event: StageProgress | None, shown: str) -> None:
    file = StringIO()
    # Without colours, so that the text is not cut by their codes.
    console = Console(file=file, width=80, force_terminal=True, color_system=None, legacy_windows=False)
    screen = Screen(console)
    screen(StageStarted("weights", "0.20 GB"))
    if event is not None:
        screen(event)
    screen._progress.refresh()
    assert shown in file.getvalue()
    screen(StageFinished("weights", 1.0))
    screen.close()
    assert "\x1b[?25h" in file.getvalue()  # The cursor is back.


def test_json_lines() -> None:
    file = StringIO()
    listener = JsonLines(Console(file=file, width=40))
    tell(listener)
    listener(StageFinished("parity", 1.0, {"KL": float("nan"), "source": "ünï" * 50}))
    listener.close()
    values = [json.loads(line) for line in file.getvalue().splitlines()]
    assert [value["event"] for value in values] == ["started", "progress", "note", "finished", "finished"]
    assert values[1] == {
        "event": "progress",
        "stage": "weights",
        "done": 50_000_000,
        "total": 200_000_000,
        "unit": "bytes",
    }
    assert values[-1]["facts"] == {"KL": None, "source": "ünï" * 50}


@pytest.mark.parametrize("width", [80, 200])
def test_summary_fits_its_width(width: int, tiny_bundle: Path) -> None:
    file = StringIO()
    Console(file=file, width=width, soft_wrap=True).print(bundle_table(open_bundle(tiny_bundle).manifest))
    lines = [line.rstrip() for line in file.getvalue().splitlines()]
    assert max(map(len, lines)) <= width
    assert lines[0].startswith("model           gemma-tiny, 6.1 M parameters")
    # What does not fit goes on below itself.
    assert all(line[0] != " " or line.startswith(" " * 16) for line in lines)
    assert "same first choice 100.00%" in " ".join(" ".join(lines).split())
