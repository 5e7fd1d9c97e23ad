"""What a build writes into its manifest."""

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import onnx_ir as ir
import torch

from gemma_export.exporter.bundle import describe_files
from gemma_export.exporter.parity.budget import requested_budget
from gemma_export.exporter.request import BuildRequest
from gemma_export.exporter.source import Source
from gemma_export.exporter.tokenizer.files import TokenizerFacts
from gemma_export.exporter.trace import OPSET
from gemma_export.graphs.storage import GRAPH_FILE, StoredFile
from gemma_export.runtime.kv_cache import layer_slots
from gemma_export.runtime.manifest import (
    ByteCounts,
    CacheScales,
    CheckpointInfo,
    FileEntry,
    GraphInfo,
    Manifest,
    ModelInfo,
    ParameterCounts,
    ParitySummary,
    QuantizationInfo,
    TensorSpec,
    TokenIds,
)
from gemma_export.version import __version__

NOT_RUN = ParitySummary("not run", "none", False, {})
TOOLS = ("torch", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "sentencepiece", "safetensors", "numpy")


def make_manifest(
    request: BuildRequest,
    source: Source,
    slots: int,
    model: ir.Model,
    passes: Mapping[str, int],
    kept: tuple[str, ...],
    quantized: QuantizationInfo | None,
    cache_scales: tuple[CacheScales, ...],
    tokens: TokenizerFacts,
    folder: Path,
    stored: dict[str, StoredFile],
) -> Manifest:
    """The manifest of a build whose graph is written; what comes later is not in it yet.

    Args:
        request: What was asked for.
        source: The model.
        slots: Of a row of the cache, where it does not roll.
        model: The graph as it was written.
        passes: How often each pass fired.
        kept: Names that stay in fp32.
        quantized: How weights were quantized; None where they are not.
        cache_scales: Of an int8 cache.
        tokens: The tokenizer's.
        folder: The bundle's, as far as it is written.
        stored: Files whose hashes are known.
    """
    config, scheme = source.config, request.scheme
    files = {name: FileEntry(file.size, file.sha256) for name, file in stored.items()}
    rolling = request.rolling_cache(config)
    total_slots = sum(layer_slots(config.num_layers, slots, rolling))
    cache = 2 * config.num_kv_heads * total_slots * config.head_dim
    weights = sum(_bytes(value) for value in model.graph.initializers.values())
    tables = sum(
        _bytes(value) for name, value in model.graph.initializers.items() if name.startswith("rotary_")
    )
    return Manifest(
        created_by=f"gemma-export {__version__}",
        model=ModelInfo(
            name=config.name,
            size=source.size,
            family=config.family,
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            num_layers=config.num_layers,
            num_query_heads=config.num_query_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            intermediate_size=config.intermediate_size,
            context_length=config.context_length,
            rms_norm_eps=config.rms_norm_eps,
            rope_theta=config.rope_theta,
            parameters=ParameterCounts(config.embedding_parameters, config.other_parameters),
        ),
        precision=request.precision,
        scheme=scheme.name,
        target=request.target,
        storage_dtype=scheme.storage,
        compute_dtype=scheme.compute,
        cache_dtype=request.cache_dtype,
        cache_scales=cache_scales,
        quantization=quantized,
        fp32_tensors=kept,
        graph=GraphInfo(
            file=GRAPH_FILE,
            opset=OPSET,
            max_length=slots,
            logits=request.logits,
            batch="dynamic",
            inputs=tuple(_tensor_spec(value) for value in model.graph.inputs),
            outputs=tuple(_tensor_spec(value) for value in model.graph.outputs),
            passes=passes,
            rolling=rolling,
        ),
        tokens=TokenIds(tokens.bos, tokens.eos, tokens.pad, tokens.stop_ids),
        bytes=ByteCounts(
            weights=weights,
            # Of the rotary tables a token reads a row; the embedding is counted once, for the head.
            per_token=weights - tables,
            cache_per_row=cache * getattr(torch, request.cache_dtype).itemsize,
        ),
        checkpoint=CheckpointInfo(
            source.checkpoint.form, source.checkpoint.digest(), source.checkpoint.source
        ),
        parity=NOT_RUN,
        tools=_tool_versions(),
        files=describe_files(folder, files),
        budget=requested_budget(request),
    )


def _bytes(value: ir.Value) -> int:
    return 0 if value.const_value is None else value.const_value.nbytes


def _tensor_spec(value: ir.Value) -> TensorSpec:
    assert value.shape is not None
    assert value.dtype is not None
    shape = tuple(dim if isinstance(dim, int) else str(dim) for dim in value.shape)
    return TensorSpec(str(value.name), value.dtype.numpy().name, shape)


def _tool_versions() -> dict[str, str]:
    versions = {}
    for name in TOOLS:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions
