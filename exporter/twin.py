"""A bundle whose graph a CPU cannot run as it is, made runnable for the time of a measurement.

The twin lies in a hidden folder inside the bundle's, shares the weights' file through a hard link, and is
gone when the measurement ends.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import mkdtemp

import onnx_ir as ir

from gemma_export.graphs.passes.emulate_half import emulate_half
from gemma_export.graphs.storage import DATA_FILE, GRAPH_FILE, disk_errors
from gemma_export.runtime.bundle import TOKENIZER_NAME, Bundle, open_bundle
from gemma_export.runtime.onnxruntime import OnnxRuntimeBackend
from gemma_export.runtime.session import Session, load


@contextmanager
def measurable_session(folder: Path) -> Iterator[Session]:
    """A session that shows what a bundle says on the device it was built for.

    A graph that computes in fp32 is run as it is; one that computes in 16 bits is run through a twin that
    rounds where the graph would (`graphs.passes.emulate_half`).

    Args:
        folder: A bundle; for a twin, one that may be written beside, on the same disk.
    """
    bundle = open_bundle(folder, check="sizes")
    if bundle.manifest.compute_dtype == "float32":
        yield load(folder, verify="sizes")
        return
    with disk_errors(folder):
        hidden = Path(mkdtemp(prefix=f".{folder.name}.twin-", dir=folder.resolve().parent))
        try:
            yield _twin(bundle, hidden)
        finally:
            shutil.rmtree(hidden)


def _twin(bundle: Bundle, hidden: Path) -> Session:
    model = ir.load(bundle.path / GRAPH_FILE)
    emulate_half(model)
    ir.save(model, hidden / GRAPH_FILE)
    for name in (DATA_FILE, TOKENIZER_NAME):
        os.link(bundle.path / name, hidden / name)
    manifest = replace(bundle.manifest, cache_dtype="float32")
    twin = Bundle(hidden, manifest, ())
    return Session(twin, OnnxRuntimeBackend(twin))
