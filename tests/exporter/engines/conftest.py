"""Graphs that engines are built from, written once."""

from collections.abc import Callable
from pathlib import Path

import pytest
from support.engine_graphs import Written, write_engine_graph

EngineGraphs = Callable[..., Written]


@pytest.fixture(scope="session")
def engine_graph(tmp_path_factory: pytest.TempPathFactory) -> EngineGraphs:
    """The shipped model's first layers in a scheme: `engine_graph("fp16")`, or `("fp16", layers=5)`."""
    written: dict[tuple[str, int, tuple[int, ...]], Written] = {}

    def graph(scheme: str, layers: int = 2, sms: tuple[int, ...] = ()) -> Written:
        key = scheme, layers, sms
        if key not in written:
            folder: Path = tmp_path_factory.mktemp(f"{scheme}-{layers}")
            written[key] = write_engine_graph(folder, scheme, layers, sms=sms)
        return written[key]

    return graph
