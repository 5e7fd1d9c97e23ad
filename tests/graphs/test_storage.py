"""Weights go to the disk block by block, each at its place, or not at all."""

import errno
import hashlib
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

from gemma_export.disk import disk_errors
from gemma_export.errors import CheckpointError, StorageError
from gemma_export.graphs.storage import (
    ALIGNMENT,
    DATA_FILE,
    GRAPH_FILE,
    INLINE_BYTES,
    LeavesRangeError,
    external_bytes,
    write_model,
)
from gemma_export.graphs.tensors import Cast, ConcatRows, InMemory, RowSource, add_initializer

LARGE = torch.arange(5 * 2**20, dtype=torch.float32).view(5, -1)
"""20 MiB: more than a block."""


def model_of(**sources: RowSource) -> ir.Model:
    """A graph that is its initializers."""
    graph = ir.Graph([], [], nodes=[], opset_imports={"": 24}, name="weights")
    for name, source in sources.items():
        add_initializer(graph, name, source)
    return ir.Model(graph, ir_version=11)


def source(*values: float, rows: int = 1000, dtype: torch.dtype = torch.float32) -> InMemory:
    """[rows, len(values)], every row the same."""
    return InMemory("source", torch.tensor([values] * rows, dtype=dtype))


def stored(folder: Path) -> dict[str, Any]:
    graph = ir.load(folder / GRAPH_FILE).graph
    return {name: value.const_value for name, value in graph.initializers.items()}


def test_values_come_back(tmp_path: Path) -> None:
    parts = (source(1, 2, rows=300), source(3, 4, rows=700))
    model = model_of(
        large=InMemory("large", LARGE),
        small=source(5, 6, rows=1),
        joined=ConcatRows(parts),
        half=Cast(source(0.1), torch.float16),
        brain=Cast(source(0.1), torch.bfloat16),
    )
    write_model(model, tmp_path)
    tensors = stored(tmp_path)
    np.testing.assert_array_equal(tensors["large"].numpy(), LARGE.numpy())
    np.testing.assert_array_equal(tensors["small"].numpy(), [[5, 6]])
    np.testing.assert_array_equal(tensors["joined"].numpy(), torch.cat([part.tensor for part in parts]))
    assert tensors["half"].dtype == ir.DataType.FLOAT16
    assert float(tensors["half"].numpy()[0, 0]) == float(torch.tensor(0.1, dtype=torch.float16))
    assert tensors["brain"].dtype == ir.DataType.BFLOAT16
    assert float(tensors["brain"].numpy()[0, 0]) == float(torch.tensor(0.1, dtype=torch.bfloat16))


def test_large_weights_are_external_on_pages_and_small_ones_inline(tmp_path: Path) -> None:
    elements = INLINE_BYTES // 4
    model = model_of(
        small=source(1, rows=elements),
        first=source(1, rows=elements + 1),
        second=source(2, rows=elements + 1),
    )
    size = external_bytes(model)
    files = write_model(model, tmp_path)
    tensors = stored(tmp_path)
    assert not isinstance(tensors["small"], ir.ExternalTensor)
    assert [tensors[name].offset for name in ("first", "second")] == [0, ALIGNMENT]
    assert size == files[DATA_FILE].size == (tmp_path / DATA_FILE).stat().st_size == ALIGNMENT + 1028


def test_sizes_and_hashes_are_those_of_the_files(tmp_path: Path) -> None:
    files = write_model(model_of(large=InMemory("large", LARGE), other=source(1)), tmp_path)
    for name, file in files.items():
        data = (tmp_path / name).read_bytes()
        assert (file.size, file.sha256) == (len(data), hashlib.sha256(data).hexdigest())


def test_progress_reaches_the_end(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    model = model_of(large=InMemory("large", LARGE), other=source(1))
    write_model(model, tmp_path, lambda done, total: told.append((done, total)))
    done, totals = zip(*told, strict=True)
    assert list(done) == sorted(done)
    assert len(done) > 2
    assert set(totals) == {done[-1]} == {external_bytes(model_of(large=InMemory("", LARGE), other=source(1)))}


def test_graph_without_weights(tmp_path: Path) -> None:
    assert external_bytes(model_of()) == 0
    assert write_model(model_of(), tmp_path)[DATA_FILE].size == 0


@pytest.mark.parametrize("rows", [1, 1000], ids=["inline", "external"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=["nan", "inf"])
def test_weight_that_is_no_number(value: float, dtype: torch.dtype, rows: int, tmp_path: Path) -> None:
    bad = source(1.0, value, rows=rows)
    if dtype != torch.float32 and value == float("inf"):
        # It may have been finite before the cast: the caller stores it in fp32, where it is seen.
        with pytest.raises(LeavesRangeError, match="weight"):
            write_model(model_of(weight=Cast(bad, dtype)), tmp_path)
        dtype = torch.float32
    with pytest.raises(CheckpointError, match="source holds NaN or infinity"):
        write_model(model_of(weight=Cast(bad, dtype)), tmp_path)


@pytest.mark.parametrize(
    ("dtype", "value"), [(torch.float16, 65520.0), (torch.bfloat16, 3.4e38)], ids=["fp16", "bf16"]
)
def test_finite_weight_beyond_a_format(dtype: torch.dtype, value: float, tmp_path: Path) -> None:
    beyond = source(1.0, value, -value)
    with pytest.raises(LeavesRangeError) as found:
        write_model(model_of(weight=Cast(beyond, dtype)), tmp_path)
    assert found.value.name == "weight"
    write_model(model_of(weight=beyond), tmp_path)


def test_infinities_that_cancel_are_seen(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        write_model(model_of(weight=source(float("inf"), float("-inf"))), tmp_path)


def test_large_sum_of_finite_weights_is_no_error(tmp_path: Path) -> None:
    write_model(model_of(weight=source(3e38, 3e38)), tmp_path)


class Failing(InMemory):
    """Fails at its second block."""

    def read(self, start: int, stop: int) -> torch.Tensor:
        if start > 0:
            raise CheckpointError("The file was changed.", "Try again.")
        return super().read(start, stop)


def test_error_of_the_reader_arrives_and_ends_it(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="was changed"):
        write_model(model_of(weight=Failing("weight", LARGE)), tmp_path)
    assert "weights" not in [thread.name for thread in threading.enumerate()]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError], ids=lambda error: error.__name__)
def test_error_of_the_listener_ends_the_reader(error: type[BaseException], tmp_path: Path) -> None:
    def fail(done: int, total: int) -> None:
        raise error

    many = {f"weight{i}": InMemory("weight", LARGE) for i in range(6)}
    with pytest.raises(error):
        write_model(model_of(**many), tmp_path, fail)
    assert "weights" not in [thread.name for thread in threading.enumerate()]


def test_full_disk_is_not_hidden(tmp_path: Path) -> None:
    (tmp_path / DATA_FILE).symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left") as error:
        write_model(model_of(weight=InMemory("weight", LARGE)), tmp_path)
    assert error.value.errno == errno.ENOSPC
    assert "weights" not in [thread.name for thread in threading.enumerate()]


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOSPC, "takes no more"),
        (errno.EDQUOT, "takes no more"),
        (errno.EFBIG, "takes no more"),
        (errno.EROFS, "cannot be written"),
        (errno.EACCES, "cannot be written"),
        (errno.ENOTDIR, "cannot be written"),
        (errno.EIO, "failed"),
    ],
    ids=lambda value: errno.errorcode[value] if isinstance(value, int) else "",
)
def test_what_a_disk_refuses_is_said(number: int, message: str) -> None:
    with pytest.raises(StorageError) as refused, disk_errors(Path("out")):
        raise OSError(number, os.strerror(number))
    assert "out" in refused.value.message
    assert message in refused.value.message
    assert os.strerror(number) in refused.value.message


def test_broken_pipe_is_not_a_disk() -> None:
    with pytest.raises(BrokenPipeError), disk_errors(Path("out")):
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))
