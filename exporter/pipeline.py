"""The stages of a build, in order, and nothing else.

    source → tokenizer and configurations → calibration → trace → passes → weights → audit → engines → parity
    → manifest

Each hands the next a value; what fails, fails here with a sentence, and leaves nothing behind. What is quick
to refuse comes before what takes long.
"""

import shutil
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter

import onnx_ir as ir
import torch

from gemma_export.errors import ParityError
from gemma_export.exporter import events
from gemma_export.exporter.audit import audit
from gemma_export.exporter.bundle import (
    check_replaceable,
    check_room,
    describe_files,
    new_bundle,
    write_manifest,
)
from gemma_export.exporter.engines.budget import MemoryPlan, check_memory
from gemma_export.exporter.engines.request import EngineRequest, engine_files
from gemma_export.exporter.genai import write_genai_config
from gemma_export.exporter.manifest import make_manifest
from gemma_export.exporter.parity.gate import ParityReport
from gemma_export.exporter.parity.measure import audit_range, measure_parity
from gemma_export.exporter.parity.page import write_report
from gemma_export.exporter.quantize.calibrate import QuantizationPlan, plan_quantization
from gemma_export.exporter.request import BuildRequest
from gemma_export.exporter.source import Source, requested_source
from gemma_export.exporter.tokenizer.files import TokenizerFacts, write_tokenizer
from gemma_export.exporter.trace import bind_weights, trace
from gemma_export.graphs import schedule
from gemma_export.graphs.passes.add_tail_logits import add_tail_logits
from gemma_export.graphs.passes.quantize_cache import quantize_cache
from gemma_export.graphs.storage import GRAPH_FILE, LeavesRangeError, StoredFile, external_bytes, write_model
from gemma_export.runtime.manifest import (
    Manifest,
    ParitySummary,
    QuantizationInfo,
    QuantizedTensor,
)
from gemma_export.runtime.rolling import RollingCache

CODES_FOLDER = ".codes"


@dataclass(frozen=True)
class BuildResult:
    """A finished bundle.

    Attributes:
        path: Its folder.
        manifest: What it says of itself.
        report: What the parity gate measured; None where it was not run.
        seconds: Wall time of the whole build.
    """

    path: Path
    manifest: Manifest
    report: ParityReport | None
    seconds: float


@dataclass(frozen=True)
class _Graph:
    """A lowered graph and what was done to it."""

    model: ir.Model
    passes: schedule.PassReport
    kept: tuple[str, ...]


def build(request: BuildRequest, listener: events.Listener = events.ignore) -> BuildResult:
    """Builds a bundle.

    Args:
        request: What to build.
        listener: Told of stages and progress.

    Raises:
        GemmaExportError: It cannot be built; nothing is left where the bundle would be.
    """
    begin = perf_counter()
    with events.stage(listener, "checkpoint") as facts:
        source = requested_source(request)
        slots = request.cache_slots(source.config)
        output = request.output_folder(source.config)
        check_replaceable(output, force=request.force)
        rolling = request.rolling_cache(source.config)
        engines = _plan_engines(request, source, slots)
        facts |= {
            "source": source.checkpoint.source,
            "form": source.checkpoint.form,
            "model": source.config.name,
        }
        if rolling is not None:
            facts["cache saved"] = f"{rolling.saved_per_row:,} bytes per row"
    with new_bundle(output, force=request.force) as folder:
        with events.stage(listener, "tokenizer") as facts:
            tokens = _write_configurations(source, slots, rolling, folder)
            facts |= {"pieces": tokens.pieces, "stop": list(tokens.stop_ids)}
        # Codes that calibration chose are read back while the weights are written, and are not kept.
        # They lie in the folder that the next build clears, should this one be killed.
        codes = folder / CODES_FOLDER
        codes.mkdir()
        plan = plan_quantization(request, source, codes, listener)
        graph, files = _write_graph(request, source, slots, plan, engines, folder, listener)
        shutil.rmtree(codes)
        quantized = _audit(request, plan, folder, listener)
        cache_scales = plan.table.cache if plan is not None and request.kv_cache == "int8" else ()
        manifest = make_manifest(
            request,
            source,
            slots,
            graph.model,
            graph.passes,
            graph.kept,
            quantized,
            cache_scales,
            tokens,
            folder,
            files,
        )
        if engines is not None:
            manifest = _compile(engines, manifest, folder, listener)
        write_manifest(folder, manifest)
        report = _check_parity(request, source, folder, listener)
        if report is not None:
            write_report(report, folder)
            manifest = replace(manifest, parity=_summary(report, request))
        manifest = replace(manifest, files=describe_files(folder, dict(manifest.files)))
        write_manifest(folder, manifest)
    return BuildResult(Path(output), manifest, report, perf_counter() - begin)


def _write_graph(
    request: BuildRequest,
    source: Source,
    slots: int,
    plan: QuantizationPlan | None,
    engines: EngineRequest | None,
    folder: Path,
    listener: events.Listener,
) -> tuple[_Graph, dict[str, StoredFile]]:
    """Lowers the graph and streams its weights; once more for each weight that turns out to leave fp16.

    The disk must have room for those of the engines too: each has its own.
    """
    copies = 1 if engines is None else 1 + engine_files(engines)
    keep = audit_range(request, source, listener)
    while True:
        graph = _lower(request, source, slots, plan, engines, keep, listener)
        needed = external_bytes(graph.model)
        check_room(folder, needed * copies)
        try:
            with events.stage(listener, "weights", f"{needed / 1e9:.2f} GB") as facts:
                files = write_model(
                    graph.model,
                    folder,
                    lambda done, total: listener(events.StageProgress("weights", done, total, "bytes")),
                )
                facts["bytes"] = needed
        except LeavesRangeError as found:
            listener(events.Note(f"{found.name} has values beyond {request.precision}: it is kept in fp32."))
            keep |= {found.name}
        else:
            return graph, files


def _lower(
    request: BuildRequest,
    source: Source,
    slots: int,
    plan: QuantizationPlan | None,
    engines: EngineRequest | None,
    keep: frozenset[str],
    listener: events.Listener,
) -> _Graph:
    scheme = request.scheme
    with events.stage(listener, "trace") as facts:
        all_logits, rolling = request.logits == "all", request.rolling_cache(source.config)
        model = trace(source.config, slots, all_logits=all_logits, rolling=rolling)
        facts["nodes"] = len(model.graph)
    with events.stage(listener, "passes") as facts:
        bind_weights(model, source.config, source.weights)
        passes = schedule.canonicalize(model)
        passes |= schedule.lower(
            model,
            request.target,
            getattr(torch, scheme.floating_storage),
            getattr(torch, scheme.compute),
            keep,
            None if plan is None else plan.quantization,
            () if engines is None else _capabilities(engines),
        )
        if request.kv_cache == "int8":
            assert plan is not None
            passes["quantize_cache"] = quantize_cache(model, plan.table.cache)
        if request.target == "cpu" and request.logits == "last":
            passes["add_tail_logits"] = add_tail_logits(model)
        facts |= {"nodes": len(model.graph), "passes": passes}
    return _Graph(model, passes, tuple(sorted(keep)))


def _plan_engines(request: BuildRequest, source: Source, slots: int) -> EngineRequest | None:
    """The engines to build, after everything that could be said against them; None where there are none.

    Raises:
        UsageError: They would not fit where they are meant to run.
        MissingDependencyError: What compiles them is not installed.
        EngineError: It compiles for the GPU at hand, and there is none.
    """
    engines = request.engine_request(source.config)
    if engines is None:
        return None
    rolling = request.rolling_cache(source.config)
    plan = MemoryPlan(
        config=source.config,
        target=request.target,
        precision=request.precision,
        scheme=request.scheme,
        slots=slots,
        rows=engines.max_batch,
        chunk=engines.prefill_chunk,
        block=request.block,
        all_logits=request.logits == "all",
        decomposed=source.config.attention_softcap is not None,
        rolling=rolling,
        sms=engines.sms,
    )
    check_memory(plan, request.engines.known_device, request.engines.memory)
    # Only a build with engines loads what compiles them.
    from gemma_export.exporter.engines.preflight import check_compiler

    check_compiler(engines)
    return engines


def _capabilities(engines: EngineRequest) -> tuple[int, ...]:
    """The compute capabilities of all engines that are to be built."""
    from gemma_export.exporter.engines.modules import plans_for

    return tuple(sm for plan in plans_for(engines) for sm in plan)


def _compile(engines: EngineRequest, manifest: Manifest, folder: Path, listener: events.Listener) -> Manifest:
    """Builds the engines, audits them, and enters them into the manifest."""
    from gemma_export.exporter.engines.build import build_engines

    graph = folder / manifest.graph.file
    layers, weights = manifest.model.num_layers, manifest.bytes.weights
    built = build_engines(graph, layers, weights, engines, folder, listener)
    return replace(manifest, engines=built, files=describe_files(folder, dict(manifest.files)))


def _write_configurations(
    source: Source, slots: int, rolling: RollingCache | None, folder: Path
) -> TokenizerFacts:
    """Writes what a client other than this project's runtime needs, and the tokenizer that both read."""
    tokens = write_tokenizer(
        source.write_tokenizer_model(folder),
        folder,
        context_length=slots,
        vocab_size=source.config.vocab_size,
    )
    write_genai_config(folder, source.config, tokens, max_length=slots, rolling=rolling)
    return tokens


def _audit(
    request: BuildRequest, plan: QuantizationPlan | None, folder: Path, listener: events.Listener
) -> QuantizationInfo | None:
    """Sees to it that what was to be quantized is, in the graph that runs, and says how.

    Raises:
        GraphError: A product, the lookup or a weight is not what was asked for.
    """
    if plan is None:
        return None
    with events.stage(listener, "audit") as facts:
        found = audit(folder / GRAPH_FILE, plan.quantization.linears, request.target)
        forms = Counter(tensor.form for tensor in found)
        facts |= dict(sorted(forms.items()))
    linears, text = plan.table.linears, plan.table.text
    return QuantizationInfo(
        calibration=None if text is None else text.source,
        tokens=0 if text is None else text.tokens,
        smoothed=len(plan.quantization.smoothing),
        kept=plan.kept,
        tensors={
            tensor.name: QuantizedTensor(
                form=tensor.form,
                method="none" if tensor.name in plan.kept else linears[tensor.name].method,
                operator=tensor.operator,
                bits=tensor.bits,
                block=tensor.block,
                bytes=tensor.bytes,
                error=None if tensor.name in plan.kept else linears[tensor.name].error,
            )
            for tensor in found
        },
    )


def _check_parity(
    request: BuildRequest, source: Source, folder: Path, listener: events.Listener
) -> ParityReport | None:
    """Runs the gate.

    Raises:
        ParityError: The bundle is outside its precision's budget, and may not be kept.
    """
    if request.parity == "none":
        return None
    report = measure_parity(folder, source, level=request.parity, listener=listener)
    if report.verdict == "fail" and not request.allow_parity_failure:
        raise ParityError(
            f"The bundle does not say what its reference says: {'; '.join(report.reasons)}.",
            "Nothing was kept. Build with a wider --precision, or keep it with --allow-parity-failure to "
            "look at its parity.html.",
        )
    return report


def _summary(report: ParityReport, request: BuildRequest) -> ParitySummary:
    return ParitySummary(
        report.verdict,
        report.level,
        allowed_failure=report.verdict == "fail" and request.allow_parity_failure,
        figures=report.summary(),
    )
