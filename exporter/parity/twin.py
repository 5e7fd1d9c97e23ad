"""A bundle whose graph a CPU cannot run as a device would, made measurable.

The twin's graph exists in memory only, over the bundle's own weights.
"""

from dataclasses import replace
from pathlib import Path

import onnx_ir as ir

from gemma_export.graphs.passes.emulate_half import emulate_half
from gemma_export.graphs.passes.fuse_transposes import fuse_transposes
from gemma_export.graphs.passes.multiply_codes import multiply_codes
from gemma_export.graphs.passes.remove_dead_code import remove_dead_code
from gemma_export.graphs.passes.rows_at_a_time import rows_at_a_time
from gemma_export.graphs.passes.unfuse import unfuse
from gemma_export.runtime.bundle import open_bundle
from gemma_export.runtime.onnxruntime import OnnxRuntimeBackend
from gemma_export.runtime.session import Session, load


def measurable_session(folder: Path) -> Session:
    """A session that shows what a bundle says on the device it was built for.

    A graph that computes in fp32 is run as it is; one that computes in 16 bits is run through a twin that
    rounds where the graph would (`graphs.passes.emulate_half`), or a GPU inside an operator of onnxruntime's
    own would (`graphs.passes.unfuse`). Its weights stay as they are stored and are made numbers in each step,
    a few rows at a time: it needs the bundle's memory and little more.

    Raises:
        BundleError: It is damaged or cannot be loaded.
    """
    bundle = open_bundle(folder, check="sizes")
    if bundle.manifest.compute_dtype == "float32":
        return load(folder, verify="sizes")
    model = ir.load(bundle.file(bundle.manifest.graph.file))
    unfuse(model)
    emulate_half(model)
    multiply_codes(model)
    rows_at_a_time(model)
    fuse_transposes(model)
    remove_dead_code(model)
    graph = ir.to_proto(model).SerializeToString()
    # What is in the cache has been rounded; its format only has to hold it.
    bundle = replace(bundle, manifest=replace(bundle.manifest, cache_dtype="float32"))
    return Session(bundle, OnnxRuntimeBackend(bundle, graph=graph))
