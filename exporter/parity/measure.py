"""What is measured on text: the range of every activation before a build, the parity of a bundle after it."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import torch

from gemma_export.calibration.range_audit import RangeAudit
from gemma_export.calibration.text import Passage, builtin_texts, read_texts
from gemma_export.errors import CheckpointError, UsageError
from gemma_export.exporter import events
from gemma_export.exporter.config import SHIPPED, GemmaConfig
from gemma_export.exporter.matmul import matmul_precision
from gemma_export.exporter.parity.budget import budget_of
from gemma_export.exporter.parity.gate import GateReference, check_parity
from gemma_export.exporter.parity.reference import Reference
from gemma_export.exporter.parity.reference_transformers import TransformersReference
from gemma_export.exporter.parity.report import Level, ParityReport, Quantized
from gemma_export.exporter.parity.twin import measurable_session
from gemma_export.exporter.request import BuildRequest
from gemma_export.exporter.source import Source, open_source, random_source
from gemma_export.runtime.bundle import Manifest, open_bundle
from gemma_export.runtime.session import Session
from gemma_export.runtime.tokenizer import Tokenizer

AUDIT_TOKENS = 256
"""The most tokens of a passage that the range audit runs."""

# The reference observes projections one by one; the graph has them merged, under these names.
_MERGED = {
    "q_proj": "qkv_proj",
    "k_proj": "qkv_proj",
    "v_proj": "qkv_proj",
    "query": "attention",
    "key": "attention",
    "scores": "attention",
    "attended": "attention",
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
    "product": "gated",
}


def audit_range(request: BuildRequest, source: Source, listener: events.Listener) -> frozenset[str]:
    """Names of the graph's values that leave fp16 on text, by the names `graphs` gives them.

    bfloat16 has the range of fp32, and a target that computes in fp32 has nothing to leave: there it is empty
    and nothing is run.
    """
    if request.scheme.compute != "float16":
        return frozenset()
    with events.stage(listener, "range audit") as facts:
        audit = RangeAudit()
        tokenizer = _tokenizer(source)
        sequences = [tokenizer.encode(passage.text)[:AUDIT_TOKENS] for passage in builtin_texts()]
        with matmul_precision("medium"):  # A magnitude is asked to stay below half of what fp16 holds.
            run = Reference(source.config, source.weights).run(sequences, observe=audit, keep_cache=False)
            run.observe_logits()
        leaving = [(name, peak) for name, peak in audit.leaving() if not _saturates(name, source.config)]
        report = audit.report()
        facts |= {
            "tensors": len(report.largest),
            "largest": max(report.largest.values()),
            "leaving fp16": len(leaving),
        }
    for name, peak in leaving:
        listener(events.Note(f"{name} reaches {peak:.4g}: it is kept in fp32."))
    return frozenset(graph_name(name) for name, _ in leaving)


def _saturates(observed: str, config: GemmaConfig) -> bool:
    """Whether an activation may become infinite in fp16: a score under a soft-cap is the cap then."""
    return config.attention_softcap is not None and observed.endswith(".scores")


def graph_name(observed: str) -> str:
    """The graph's name of an activation that the reference observed."""
    head, _, last = observed.rpartition(".")
    name = _MERGED.get(last, last)
    return f"{head}.{name}" if head else name


def measure_parity(folder: Path, source: Source, *, level: Level, listener: events.Listener) -> ParityReport:
    """Holds a bundle against the source it was built from, on the project's own texts."""
    reference = Reference(source.config, source.weights)
    session = measurable_session(folder)
    return _measure(session, reference, builtin_texts(), level, source.config.name, source.config, listener)


def measure_bundle(
    bundle: Path,
    *,
    checkpoint: Path | None,
    reference: Literal["eager", "transformers"],
    text: Path | None,
    level: Level,
    listener: events.Listener,
) -> ParityReport:
    """Holds a bundle against a checkpoint.

    Args:
        bundle: The bundle.
        checkpoint: The checkpoint; None takes the one that the bundle was built from.
        reference: The project's own decoder, layer by layer, or `transformers`, whole in memory.
        text: A file to measure on; None takes the project's own texts.
        level: How much is measured.
        listener: Told of progress.

    Raises:
        GemmaExportError: Something of this cannot be opened, or the two are not of one shape.
    """
    passages = builtin_texts() if text is None else read_texts(text)
    opened = open_bundle(bundle, check="quick")
    with events.stage(listener, "checkpoint") as facts:
        source = source_of_bundle(opened.manifest, checkpoint, opened.path / "tokenizer.model")
        facts["source"] = source.checkpoint.source
        _check_same_shape(opened.manifest, source)
        if source.checkpoint.digest() != opened.manifest.checkpoint.digest:
            listener(events.Note("This is not the checkpoint that the bundle was built from."))
    against = _reference(reference, source)
    session = measurable_session(opened.path)
    return _measure(session, against, passages, level, str(bundle), source.config, listener)


def _measure(
    session: Session,
    reference: GateReference,
    passages: Sequence[Passage],
    level: Level,
    subject: str,
    config: GemmaConfig,
    listener: events.Listener,
) -> ParityReport:
    manifest = session.manifest
    rolling = manifest.graph.rolling
    with events.stage(listener, "parity") as facts:
        report = check_parity(
            session,
            reference,
            [session.tokenizer.encode(passage.text) for passage in passages],
            level=level,
            precision=manifest.precision,
            bos=manifest.tokens.bos,
            stop=manifest.tokens.stop,
            names=[passage.name for passage in passages],
            decode=session.tokenizer.decode,
            subject=f"{subject}, {manifest.precision} for {manifest.target}{_how(manifest)}",
            budget=budget_of(manifest),
            window=config.sliding_window if rolling is None else rolling.slots,
            on_event=listener,
        )
        report = replace(report, quantized=what_is_quantized(manifest))
        facts |= {
            "verdict": report.verdict,
            "KL": report.figures.mean_kl,
            "largest error": report.figures.max_relative_error,
            "same first choice": f"{report.figures.top1_agreement:.2%}",
        }
    return report


def what_is_quantized(manifest: Manifest) -> Quantized | None:
    """What a manifest says of it, for a report; None where nothing is."""
    found = manifest.quantization
    if found is None:
        return None
    # A Counter would not survive `asdict`, which makes a new one of pairs.
    forms = dict(Counter(tensor.form for tensor in found.tensors.values()))
    return Quantized(manifest.scheme, dict(forms), found.kept, manifest.cache_dtype)


def _how(manifest: Manifest) -> str:
    if manifest.compute_dtype == "float32":
        return ""
    return f", each {manifest.compute_dtype} value rounded on a CPU as a device rounds it"


def _reference(kind: Literal["eager", "transformers"], source: Source) -> GateReference:
    if kind == "eager":
        return Reference(source.config, source.weights)
    folder = source.checkpoint.folder
    if folder is None or source.checkpoint.config is None:
        raise UsageError(
            f"transformers cannot read {source.checkpoint.source}.",
            "Give a Hugging Face folder with --checkpoint, or take --reference eager.",
        )
    return TransformersReference(folder)


_RANDOM = re.compile(r"random weights, seed (\d+)")


def source_of_bundle(manifest: Manifest, checkpoint: Path | None, tokenizer: Path) -> Source:
    """The source of a bundle: the one that was named, or the one that its manifest names."""
    if checkpoint is not None:
        return open_source(checkpoint, tokenizer=tokenizer)
    if (match := _RANDOM.fullmatch(manifest.checkpoint.source or "")) is not None:
        storage = manifest.storage_dtype
        dtype = torch.bfloat16 if storage in ("int8", "int4") else getattr(torch, storage)
        return random_source(manifest.model.size, int(match.group(1)), dtype, tokenizer)
    source = manifest.checkpoint.source
    if source is not None and Path(source).exists():
        return open_source(Path(source), tokenizer=tokenizer)
    if manifest.model.size in SHIPPED:  # A bundle of what ships, on another machine.
        shipped = open_source(size=manifest.model.size, tokenizer=tokenizer)
        if shipped.checkpoint.digest() == manifest.checkpoint.digest:
            return shipped
    raise CheckpointError(
        f"The checkpoint that the bundle was built from is not at {source}.",
        "Name it with --checkpoint PATH.",
    )


def _check_same_shape(manifest: Manifest, source: Source) -> None:
    model, config = manifest.model, source.config
    for field in ("vocab_size", "hidden_size", "num_layers", "num_query_heads", "num_kv_heads", "head_dim"):
        ours, theirs = getattr(model, field), getattr(config, field)
        if ours != theirs:
            raise CheckpointError(
                f"The bundle and the checkpoint are different models: {field} is {ours} and {theirs}.",
                "Give the checkpoint that the bundle was built from.",
            )


def _tokenizer(source: Source) -> Tokenizer:
    """The source's tokenizer; for random weights one that is made in a folder which then goes away."""
    with TemporaryDirectory() as folder:
        return Tokenizer(source.write_tokenizer_model(Path(folder)), source.config.vocab_size)
