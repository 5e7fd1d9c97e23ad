"""Engines for a bundle: which plans, each compiled, audited and described."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gemma_export.disk import disk_errors
from gemma_export.exporter import events
from gemma_export.exporter.engines.builder import compile_plan
from gemma_export.exporter.engines.engine_graph import EngineGraph, check_codes, read_graph
from gemma_export.exporter.engines.modules import load_compiler, plans_for
from gemma_export.exporter.engines.plan import read_plan
from gemma_export.exporter.engines.plan_audit import audit_plan, check_network, require_clean
from gemma_export.exporter.engines.profiles import Profile, profiles_for, trtexec_command
from gemma_export.exporter.engines.request import EngineRequest, Flavour, check_types
from gemma_export.runtime.manifest import EngineInfo, ProfileInfo

FOLDER = "engines"
"""Of a bundle: where its engines are."""
STAGE = "engine"


def build_engines(
    graph: Path,
    layers: int,
    weights: int,
    request: EngineRequest,
    folder: Path,
    listener: events.Listener = events.ignore,
) -> tuple[EngineInfo, ...]:
    """Compiles a bundle's graph, and sees to it that the engines are what was asked for.

    Args:
        graph: The bundle's graph, beside its weights.
        layers: Decoder layers.
        weights: Bytes of its weights as they are stored.
        request: Which engines.
        folder: The bundle's, not finished yet; the engines are written into its `engines`.
        listener: Told of a stage for each plan, in percent.

    Returns:
        One for each plan.

    Raises:
        MissingDependencyError: What compiles is not installed.
        EngineError: TensorRT does not compile the graph, or makes another engine of it than was asked for.
        UsageError: What was asked for cannot run the graph.
        StorageError: The disk is full or refuses.
    """
    source = read_graph(graph)
    profiles = profiles_for(request, source.slots)
    command = trtexec_command(Path(graph.name), source.inputs, profiles, Path("model.engine"))
    trt = load_compiler(request.flavour, command)
    plans = plans_for(request)
    for sms in plans:
        check_types(sms, source.types)
        check_codes(sms, source.uses)
    with disk_errors(folder):
        (folder / FOLDER).mkdir(exist_ok=True)
        return tuple(
            _build(trt, request.flavour, source, layers, weights, sms, profiles, folder, listener)
            for sms in plans
        )


def _build(
    trt: Any,
    flavour: Flavour,
    source: EngineGraph,
    layers: int,
    weights: int,
    sms: tuple[int, ...],
    profiles: Sequence[Profile],
    folder: Path,
    listener: events.Listener,
) -> EngineInfo:
    """Compiles one plan and audits it; what is not as it was asked for is not kept."""
    targets = ", ".join(map(str, sms))
    name = f"{FOLDER}/{flavour}-sm{'-'.join(map(str, sms))}.engine"
    with events.stage(listener, STAGE, f"SM {targets}") as facts:
        built = compile_plan(
            trt,
            source,
            profiles,
            sms if flavour == "rtx" else (),
            folder / name,
            check=lambda network: check_network(network, source, layers),
            progress=lambda done, total: listener(events.StageProgress(STAGE, done, total, "percent")),
        )
        try:
            audit = audit_plan(read_plan(built.log), source, profiles, weights)
            require_clean(audit, f"The engine for SM {targets}")
        except BaseException:
            (folder / name).unlink()
            raise
        facts |= {"sm": targets, "bytes": built.size, "kernels": sum(audit.kernels.values())}
    return EngineInfo(
        file=name,
        flavour=flavour,
        version=trt.__version__,
        sms=sms,
        profiles=tuple(
            ProfileInfo(profile.name, profile.batch, profile.tokens, activations)
            for profile, activations in zip(profiles, audit.activation_bytes, strict=True)
        ),
        weight_bytes=audit.weight_bytes,
        kernels=audit.kernels,
    )
