"""Writes a graph's weights to one data file, a block at a time, and then the graph that points into it.

One thread reads and transforms blocks, another writes them while a third hashes them; between them stands a
queue of a few blocks. Memory is those few blocks, whatever the model, and there is no 2 GiB limit: the graph
file holds no weights.
"""

import hashlib
import queue
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
import torch

from gemma_export.graphs.direct_file import DirectFile
from gemma_export.graphs.tensors import StreamedTensor, not_finite, streamed

GRAPH_FILE = "model.onnx"
DATA_FILE = "model.onnx.data"
ALIGNMENT = 4096
"""Offsets are multiples of a page, so that a runtime can map a weight where it lies."""
INLINE_BYTES = 1024
"""Tensors up to this size stay in the graph file."""
QUEUED_BLOCKS = 4

Progress = Callable[[int, int], None]
"""Called with bytes written so far and bytes in all."""


class LeavesRangeError(Exception):
    """A finite weight became infinite in the 16-bit format it was to be stored in.

    Not an error for the user: the caller keeps the weight in fp32 and writes again.
    """

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


@dataclass(frozen=True)
class StoredFile:
    """A file that was written: bytes and SHA-256 in hexadecimal."""

    size: int
    sha256: str


@dataclass(frozen=True)
class _Placed:
    """A tensor and where it goes in the data file."""

    value: ir.Value
    tensor: StreamedTensor
    offset: int


def external_bytes(model: ir.Model) -> int:
    """Size the data file will have."""
    placed = _layout(model)
    return placed[-1].offset + placed[-1].tensor.nbytes if placed else 0


def write_model(model: ir.Model, folder: Path, progress: Progress | None = None) -> dict[str, StoredFile]:
    """Writes `model.onnx` and its data into a folder, and points the model's weights at the file.

    Args:
        model: Initializers are streamed tensors or small constants.
        folder: Exists; both files are created in it.
        progress: Told of bytes as they are written.

    Returns:
        Size and hash of each file, by name.

    Raises:
        CheckpointError: A weight holds NaN or infinity.
        LeavesRangeError: A weight does not fit the 16-bit format it was cast to.
        OSError: The disk is full or cannot be written.
    """
    _check_inline(model)
    placed = _layout(model)
    total = placed[-1].offset + placed[-1].tensor.nbytes if placed else 0
    data = _write_data(placed, folder / DATA_FILE, total, progress)
    for item in placed:
        item.value.const_value = ir.ExternalTensor(
            DATA_FILE,
            item.offset,
            item.tensor.nbytes,
            item.tensor.dtype,
            shape=ir.Shape(item.tensor.shape),
            name=str(item.value.name),
            base_dir=folder,
        )
    ir.save(model, folder / GRAPH_FILE)
    graph = (folder / GRAPH_FILE).read_bytes()
    return {
        GRAPH_FILE: StoredFile(len(graph), hashlib.sha256(graph).hexdigest()),
        DATA_FILE: data,
    }


def _layout(model: ir.Model) -> list[_Placed]:
    """Offsets of all streamed tensors that are not small, in the graph's order."""
    placed: list[_Placed] = []
    end = 0
    for value in model.graph.initializers.values():
        tensor = streamed(value)
        if tensor is not None and tensor.nbytes > INLINE_BYTES:
            offset = -(-end // ALIGNMENT) * ALIGNMENT
            placed.append(_Placed(value, tensor, offset))
            end = offset + tensor.nbytes
    return placed


def _write_data(placed: list[_Placed], path: Path, total: int, progress: Progress | None) -> StoredFile:
    """Writes and hashes the data file in one pass; the reader runs in a thread of its own."""
    blocks: queue.Queue[memoryview | BaseException | None] = queue.Queue(maxsize=QUEUED_BLOCKS)
    stop = threading.Event()
    reader = threading.Thread(target=_read_blocks, args=(placed, blocks, stop), name="weights", daemon=True)
    digest = hashlib.sha256()
    written = 0
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # Three threads share the work already; more would wait, spinning.
    reader.start()
    try:
        with DirectFile(path) as file, ThreadPoolExecutor(1, "hash") as hashing:
            while (block := blocks.get()) is not None:
                if isinstance(block, BaseException):
                    raise block
                hashed = hashing.submit(digest.update, block)  # While the disk takes the same block.
                file.write(block)
                hashed.result()
                written += len(block)
                if progress is not None:
                    progress(written, total)
    finally:
        # However it ended, the reader must not stay blocked on a queue that nobody empties.
        stop.set()
        while reader.is_alive():
            with suppress(queue.Empty):
                blocks.get(timeout=0.05)
        reader.join()
        torch.set_num_threads(threads)
    return StoredFile(written, digest.hexdigest())


def _read_blocks(
    placed: list[_Placed], blocks: queue.Queue[memoryview | BaseException | None], stop: threading.Event
) -> None:
    """Reads, checks and queues every tensor's blocks, with the padding between tensors."""
    try:
        end = 0
        for item in placed:
            if item.offset > end:
                blocks.put(memoryview(bytes(item.offset - end)))
            for block in item.tensor.blocks():
                if stop.is_set():
                    return
                _check_finite(block, item.tensor)
                blocks.put(block.contiguous().view(-1).view(torch.uint8).numpy().data)
            end = item.offset + item.tensor.nbytes
        blocks.put(None)
    except BaseException as error:
        blocks.put(error)


def _check_inline(model: ir.Model) -> None:
    """Checks the weights that go into the graph file, as the others are checked on their way to the data."""
    for value in model.graph.initializers.values():
        tensor = streamed(value)
        if tensor is not None and tensor.nbytes <= INLINE_BYTES:
            for block in tensor.blocks():
                _check_finite(block, tensor)


def _check_finite(block: torch.Tensor, tensor: StreamedTensor) -> None:
    """Refuses NaN and infinity; a sum shows either at the cost of one read. Codes are always finite."""
    if not block.is_floating_point():
        return
    if torch.isfinite(block.sum(dtype=torch.float32)) or torch.isfinite(block).all():
        return
    if torch.isnan(block).any() or block.dtype == torch.float32:
        raise not_finite(tensor.source)
    raise LeavesRangeError(str(tensor.name))
