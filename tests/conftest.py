"""What tests of every room share: bundles built once; the command line, in this process and in its own."""

import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from support.command_line import Invoke, Outcome, RunCli, command

from gemma_export.exporter.config import tiny_folder

# How long an example takes is the machine's, and what else it does.
settings.register_profile("no clock", deadline=None)
settings.load_profile("no clock")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The fast ones first."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is not None)


@pytest.fixture
def invoke(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Invoke:
    """The command line in this process: fast, and open to monkeypatching."""
    from gemma_export.exporter.cli import main

    def run(arguments: Sequence[object]) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["gemma-export", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "200")
        capsys.readouterr()
        with _signal_handlers_put_back(), pytest.raises(SystemExit) as end:
            main()
        captured = capsys.readouterr()
        return Outcome(int(end.value.code or 0), captured.out, captured.err)

    return run


@pytest.fixture(scope="session")
def run_cli() -> RunCli:
    """The command line in a process of its own."""

    def run(
        arguments: Sequence[object],
        *,
        prelude: str = "",
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        **options: Any,
    ) -> subprocess.CompletedProcess[str]:
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **options}
        return subprocess.run(command(arguments, prelude), env=env, cwd=cwd, check=False, **options)

    return run


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Torch on one thread: for tiny products, several only wait for each other, spinning."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Builds of one shape share one trace, which is most of what a small build takes."""
    _share_traces(monkeypatch)


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped model in fp32 for `cpu`, held against its checkpoint. Read only: copy it to change it."""
    return _build(tmp_path_factory.mktemp("bundles") / "tiny", parity="quick")


@pytest.fixture(scope="session")
def tiny_bundle_all(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with the logits of all tokens and 64 slots, not measured. Read only: copy it to change it."""
    return _build(tmp_path_factory.mktemp("bundles") / "all", parity="none", logits="all", max_length=64)


@pytest.fixture
def bundle_copy(tiny_bundle: Path, tmp_path: Path) -> Path:
    """The tiny bundle, to be damaged."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "copy"))


@pytest.fixture
def tiny_checkpoint(tmp_path: Path) -> Path:
    """The shipped checkpoint, to be damaged."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for name in ("model.safetensors", "config.json", "tokenizer.model"):
        shutil.copyfile(tiny_folder() / name, folder / name)
    return folder


def _build(output: Path, **options: Any) -> Path:
    from gemma_export.exporter.pipeline import build
    from gemma_export.exporter.request import BuildRequest

    with pytest.MonkeyPatch.context() as patch:
        _share_traces(patch)
        return build(BuildRequest(size="tiny", output=output, **options)).path


def _share_traces(monkeypatch: pytest.MonkeyPatch) -> None:
    from gemma_export.exporter import pipeline

    def shared(config: Any, max_length: int, **options: Any) -> Any:
        # Passes change a graph in place.
        return _clone(_trace(config, max_length, tuple(sorted(options.items()))))

    monkeypatch.setattr(pipeline, "trace", shared)


@cache
def _trace(config: Any, max_length: int, options: tuple[tuple[str, Any], ...]) -> Any:
    from gemma_export.exporter.trace import trace

    return trace(config, max_length, **dict(options))


def _clone(model: Any) -> Any:
    import onnx_ir as ir

    copy = model.clone()
    values = [*copy.graph.inputs, *copy.graph.initializers.values()]
    for value in (*values, *(output for node in copy.graph for output in node.outputs)):
        if value.dtype is not None:
            value.type = ir.TensorType(value.dtype)  # A clone shares the types, and passes change those too.
    return copy


@contextmanager
def _signal_handlers_put_back() -> Iterator[None]:
    numbers = (signal.SIGTERM, signal.SIGHUP)
    handlers = [signal.getsignal(number) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, handlers, strict=True):
            signal.signal(number, handler)
