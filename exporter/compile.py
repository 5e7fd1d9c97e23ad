"""Engines for a finished bundle, built where they will run: the command `compile`.

    verify → budget → engines → manifest

The bundle gets its engines and a new manifest in one step, or stays as it was.
"""

import os
import shutil
from dataclasses import dataclass, fields, replace
from pathlib import Path
from time import perf_counter

from gemma_export.errors import UsageError
from gemma_export.exporter import events
from gemma_export.exporter.bundle import (
    check_replaceable,
    check_room,
    describe_files,
    new_bundle,
    write_manifest,
)
from gemma_export.exporter.config import GemmaConfig
from gemma_export.exporter.engines.budget import MemoryPlan, check_memory
from gemma_export.exporter.engines.options import EngineOptions
from gemma_export.exporter.engines.preflight import check_compiler
from gemma_export.exporter.engines.profiles import profiles_for, trtexec_command
from gemma_export.exporter.engines.request import EngineRequest, Flavour, engine_files
from gemma_export.exporter.schemes import scheme_for
from gemma_export.graphs.formats import TABLE
from gemma_export.runtime.bundle import Bundle, open_bundle
from gemma_export.runtime.manifest import EngineInfo, Manifest
from gemma_export.runtime.rolling import RollingCache

COMPILED = ("onnx", "rtx", "tensorrt")
"""Targets whose graph TensorRT takes: they have one and the same."""


@dataclass(frozen=True)
class CompileResult:
    """A bundle with engines.

    Attributes:
        path: Its folder.
        manifest: What it says of itself now.
        seconds: Wall time of it all.
    """

    path: Path
    manifest: Manifest
    seconds: float


def compile_bundle(
    bundle: Path,
    flavour: Flavour,
    options: EngineOptions,
    output: Path | None = None,
    *,
    force: bool = False,
    listener: events.Listener = events.ignore,
) -> CompileResult:
    """Builds engines from a bundle's graph.

    Args:
        bundle: A bundle of the target `onnx`, `rtx` or `tensorrt`, with its graph.
        flavour: What compiles it.
        options: What the engines must run, and where.
        output: The folder of a new bundle; None gives the engines to the old one.
        force: Replace a bundle that is at `output`.
        listener: Told of stages and progress.

    Raises:
        GemmaExportError: The bundle is damaged, its graph is of another kind, the engines would not fit or
            cannot be built. The bundle is as it was, and nothing is at `output`.
    """
    begin = perf_counter()
    if output is not None:
        check_replaceable(output, force=force)
    with events.stage(listener, "verify") as facts:
        opened = open_bundle(bundle, check="full")
        facts["files"] = len(opened.manifest.files)
    request = _plan(opened, flavour, options)
    folder = opened.path if output is None else output
    with new_bundle(folder, force=force or output is None) as draft:
        manifest = _compile(opened, request, draft, linked=output is None, listener=listener)
        write_manifest(draft, manifest)
    return CompileResult(bundle if output is None else output, manifest, perf_counter() - begin)


def _plan(bundle: Bundle, flavour: Flavour, options: EngineOptions) -> EngineRequest:
    """The engines to build, after everything that could be said against them."""
    manifest = bundle.manifest
    if manifest.target not in COMPILED:
        raise UsageError(
            f"{bundle.path} was built for {manifest.target}, whose operators TensorRT does not have.",
            f"Build it with --target {flavour}, or with --target onnx to compile it on the device.",
        )
    if manifest.graph.file not in manifest.files:
        raise UsageError(
            f"{bundle.path} has no graph to compile: it was packed with --engines-only.",
            "Pack the whole bundle where it was built, and compile that.",
        )
    scheme = scheme_for(flavour, manifest.precision, manifest.scheme)
    options.check(flavour, manifest.precision)
    rolling = manifest.graph.rolling
    _check_chunk(options, rolling)
    request = options.request(flavour, manifest.graph.max_length if rolling is None else rolling.chunk)
    plan = MemoryPlan(
        config=_config(manifest),
        target=flavour,
        precision=manifest.precision,
        scheme=scheme,
        slots=manifest.graph.max_length,
        rows=request.max_batch,
        chunk=request.prefill_chunk,
        block=_block(manifest),
        all_logits=manifest.graph.logits == "all",
        decomposed=manifest.graph.passes.get("decompose_attention", 0) > 0,
        rolling=rolling,
        sms=request.sms,
    )
    check_memory(plan, options.known_device, options.memory)
    graph = manifest.graph
    file = bundle.path / graph.file
    profiles = profiles_for(request, graph.max_length)
    check_compiler(request, trtexec_command(file, graph.inputs, profiles, file.with_name("model.engine")))
    return request


def _block(manifest: Manifest) -> int | None:
    """Columns of a layer's weight that share a scale; None for rows, and for what is not quantized."""
    if manifest.quantization is None:
        return None
    blocks = (tensor.block for name, tensor in manifest.quantization.tensors.items() if name != TABLE)
    return next((block for block in blocks if block is not None), None)


def _check_chunk(options: EngineOptions, rolling: RollingCache | None) -> None:
    """Refuses a prefill chunk that caches which roll do not take at once."""
    if rolling is not None and (options.prefill_chunk or 0) > rolling.chunk:
        raise UsageError(
            f"--prefill-chunk {options.prefill_chunk} is more than the {rolling.chunk} tokens that the "
            "rolling cache of this bundle takes at once.",
            f"Give at most {rolling.chunk}, or build the bundle with --local-cache full.",
        )


def _config(manifest: Manifest) -> GemmaConfig:
    """The shape as the manifest has it."""
    known = {field.name for field in fields(manifest.model)}
    return GemmaConfig(
        **{f.name: getattr(manifest.model, f.name) for f in fields(GemmaConfig) if f.name in known}
    )


def _compile(
    bundle: Bundle, request: EngineRequest, draft: Path, *, linked: bool, listener: events.Listener
) -> Manifest:
    """Fills a new bundle's folder with the old one's files and with engines."""
    from gemma_export.exporter.engines.build import build_engines

    old = bundle.manifest
    older_engines = {engine.file for engine in old.engines}
    files = [name for name in old.files if name not in older_engines]
    copied = 0 if linked else sum(old.files[name].size for name in files)
    check_room(draft, old.bytes.weights * engine_files(request) + copied)
    for name in files:
        _carry(bundle.path / name, draft / name, linked=linked)
    graph, layers = draft / old.graph.file, old.model.num_layers
    built = build_engines(graph, layers, old.bytes.weights, request, draft, listener)
    # Only now: the builder must not write into a file that the old bundle still has.
    kept = tuple(engine for engine in old.engines if not _replaced(engine, built))
    for name in (*(engine.file for engine in kept), *(bundle.extra if linked else ())):
        _carry(bundle.path / name, draft / name, linked=linked)
    known = {name: old.files[name] for name in (*files, *(engine.file for engine in kept))}
    described = describe_files(draft, known)
    listed = {name: entry for name, entry in described.items() if name not in bundle.extra}
    return replace(old, target=request.flavour, engines=(*built, *kept), files=listed)


def _replaced(engine: EngineInfo, built: tuple[EngineInfo, ...]) -> bool:
    """Whether there is a newer engine in its place, or for one of its GPUs."""
    return any(
        engine.file == new.file or (engine.flavour == new.flavour and set(engine.sms) & set(new.sms))
        for new in built
    )


def _carry(source: Path, destination: Path, *, linked: bool) -> None:
    """Puts a file of the old bundle into the new one: the file itself where the old one goes, or a copy."""
    destination.parent.mkdir(parents=True, exist_ok=True)
    if linked:
        try:
            os.link(source, destination, follow_symlinks=False)
        except OSError:  # Not every file system has links.
            pass
        else:
            return
    shutil.copyfile(source, destination, follow_symlinks=False)
