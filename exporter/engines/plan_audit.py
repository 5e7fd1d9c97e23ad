"""The audit of a plan: what TensorRT built is what was asked for.

TensorRT compiles almost anything, silently: an attention whose mask means something else, a weight whose
codes are made 16-bit numbers in memory on every call, a weight in two layouts, a cache that is copied for
every token. None of that is an error to it, and on a machine without a GPU nothing can be run. The parsed
network and the list of the plan's kernels say all of it.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from gemma_export.errors import EngineError
from gemma_export.exporter.engines.engine_graph import CODES, FLOATS, CacheProduct, EngineGraph, WeightUse
from gemma_export.exporter.engines.network import NetworkFacts
from gemma_export.exporter.engines.plan import Kernel, PlanText
from gemma_export.exporter.engines.profiles import Profile

PRODUCT = "gemm"
"""The kind of the kernels that compute products."""
SHOWN = 3
"""Findings that are told; more of them have the same cause as a rule."""
# Beside the weights an engine holds constants that were folded, each at an aligned address: of 2B 0.02 %, and
# some kilobytes a layer. A projection that is stored twice is more.
_SHARE, _CONSTANT = 500, 64 << 10


@dataclass(frozen=True)
class PlanAudit:
    """What is in a plan.

    Attributes:
        kernels: How many of each kind, over all profiles.
        weight_bytes: Device memory of the weights.
        activation_bytes: Device memory a step needs, by profile.
        findings: What is not as it was asked for, a clause each.
    """

    kernels: Mapping[str, int]
    weight_bytes: int
    activation_bytes: tuple[int, ...]
    findings: tuple[str, ...]


def check_network(facts: NetworkFacts, graph: EngineGraph, layers: int) -> None:
    """Refuses a parsed network before it is compiled.

    Args:
        facts: What the parser made of the graph.
        graph: The graph.
        layers: Decoder layers.

    Raises:
        EngineError: Attention or the cache is not what the graph means.
    """
    _refuse(
        tuple(_network_findings(facts, graph, layers)), "TensorRT reads the graph otherwise than it is meant"
    )


def audit_plan(plan: PlanText, graph: EngineGraph, profiles: Sequence[Profile], weights: int) -> PlanAudit:
    """Holds a plan against its graph.

    Args:
        plan: The plan.
        graph: What it was compiled from.
        profiles: In the plan's order.
        weights: Bytes of the graph's weights as they are stored.
    """
    names = [profile.name for profile in profiles]
    findings = [
        *(f"it takes no notice of the input {name}" for name in plan.unread),
        *_profile_findings(plan, names),
        *_attention_findings(plan, graph.attentions, names),
        *_product_findings(plan, graph.products, profiles),
        *_cache_findings(plan, graph.caches, names),
        *_table_findings(graph.uses),
        *_weight_findings(plan, graph.uses, names),
    ]
    if plan.weight_bytes > weights + weights // _SHARE + _CONSTANT:
        findings.append(
            f"its weights take {plan.weight_bytes:,} bytes and the graph's {weights:,}: some are stored twice"
        )
    kinds = Counter(kernel.shown_kind for kernel in plan.kernels)
    return PlanAudit(dict(sorted(kinds.items())), plan.weight_bytes, plan.activation_bytes, tuple(findings))


def require_clean(audit: PlanAudit, what: str) -> None:
    """Refuses a plan that is not what was asked for.

    Args:
        audit: Of it.
        what: The engine, for the message.

    Raises:
        EngineError: There are findings.
    """
    _refuse(audit.findings, f"{what} is not what was asked for")


def _refuse(findings: tuple[str, ...], sentence: str) -> None:
    if findings:
        more = f"; and {len(findings) - SHOWN} more" if len(findings) > SHOWN else ""
        raise EngineError(f"{sentence}: {'; '.join(findings[:SHOWN])}{more}.", _HINT)


_HINT = "Nothing was kept. Build the bundle again with this release; if it stays so, please report it."


def _network_findings(facts: NetworkFacts, graph: EngineGraph, layers: int) -> Iterator[str]:
    yield from (f"it takes no notice of the input {name}" for name in facts.unread)
    for name, kind in facts.attention.items():
        if kind == "UPPER_LEFT":
            yield f"{name} masks as if its first query stood at the cache's first slot, always"
        elif kind != "NONE":
            yield f"{name} has a causal mask of its own ({kind}) beside the graph's"
    decomposed = len({product.cache for product in graph.products}) // 2
    if len(facts.attention) + decomposed != layers:
        yield f"it has {len(facts.attention) + decomposed} attentions for {layers} layers"
    for update in facts.updates:
        if not update.reads_input:
            yield f"{update.name} writes into a copy of the cache: something stands between it and the input"
        if not update.makes_output:
            yield f"{update.name} is not the cache's output: something stands between the two"
    if len(facts.updates) != 2 * layers:
        yield f"it updates {len(facts.updates)} caches for {layers} layers, not {2 * layers}"


def _profile_findings(plan: PlanText, profiles: Sequence[str]) -> Iterator[str]:
    found = {kernel.profile for kernel in plan.kernels}
    if found != set(range(len(profiles))) or len(plan.activation_bytes) != len(profiles):
        yield f"it has kernels of {len(found)} profiles, not of {len(profiles)}"


def _attention_findings(plan: PlanText, attentions: int, profiles: Sequence[str]) -> Iterator[str]:
    fused = Counter(kernel.profile for kernel in plan.kernels if kernel.is_attention)
    for index, name in enumerate(profiles):
        if fused[index] != attentions:
            yield f"{fused[index]} of {attentions} attentions are one kernel in the profile {name}"


def _product_findings(
    plan: PlanText, products: Sequence[CacheProduct], profiles: Sequence[Profile]
) -> Iterator[str]:
    """Each product is one kernel, which for a token reads the cache itself: a copy is of all slots.

    For several tokens TensorRT turns a cache once for all of them.
    """
    for index, profile in enumerate(profiles):
        kernels = [kernel for kernel in plan.kernels if kernel.profile == index and kernel.kind == PRODUCT]
        for product in products:
            mine = [kernel for kernel in kernels if product.operator in kernel.operators]
            if len(mine) != 1:
                yield f"{product.operator} is {len(mine)} kernels in the profile {profile.name}"
            elif profile.tokens.max == 1 and all(t.name != product.cache for t in mine[0].inputs):
                yield f"{product.cache} is copied for {product.operator}, in the profile {profile.name}"


def _cache_findings(plan: PlanText, caches: Sequence[str], profiles: Sequence[str]) -> Iterator[str]:
    """A cache is updated in place where one kernel writes it, and has it among its inputs."""
    for index, name in enumerate(profiles):
        kernels = [kernel for kernel in plan.kernels if kernel.profile == index]
        for cache in caches:
            writers = [kernel for kernel in kernels if any(t.name == cache for t in kernel.outputs)]
            in_place = [kernel for kernel in writers if any(t.name == cache for t in kernel.inputs)]
            if len(in_place) != 1 or len(writers) != 1:
                yield f"{cache} is not updated in place in the profile {name}"


def _table_findings(uses: Sequence[WeightUse]) -> Iterator[str]:
    """The lookup and the head share a table: two would be stored, both of them once."""
    products = {use.weight for use in uses if not use.lookup}
    for use in uses:
        if use.lookup and use.weight not in products:
            yield f"{use.operator} looks up {use.weight}, which is another table than the head's"


def _weight_findings(plan: PlanText, uses: Sequence[WeightUse], profiles: Sequence[str]) -> Iterator[str]:
    expanded = set()
    sizes = {use.count for use in uses if use.type in CODES}
    for kernel in plan.kernels:
        for weight in kernel.constants:
            if weight.type in CODES and weight.count in sizes and _writes_floats(kernel, weight.count):
                expanded.add((kernel.profile, weight.count))
                yield (
                    f"{_operators(kernel)}: {weight.type} is expanded to 16 bits in memory on every call, in "
                    f"the profile {profiles[kernel.profile]}"
                )
    for index, name in enumerate(profiles):
        kernels = [kernel for kernel in plan.kernels if kernel.profile == index]
        for use in uses:
            if (index, use.count) in expanded:
                continue  # Its product reads what was expanded.
            mine = [kernel for kernel in kernels if use.operator in kernel.operators]
            reading = [kernel for kernel in mine if _reads(kernel, use)]
            if not reading:
                types = sorted({t.type for k in mine for t in k.constants if t.count == use.count})
                yield (
                    f"{use.operator} reads {' and '.join(types) or 'nothing that is stored'} and not the "
                    f"{use.type} of its weight, in the profile {name}"
                )
            elif use.codes and not any(t.type in CODES for k in reading for t in k.inputs):
                yield f"{use.operator} multiplies 16-bit numbers and not {use.type}, in the profile {name}"


def _reads(kernel: Kernel, use: WeightUse) -> bool:
    return any(t.type == use.type and t.count == use.count for t in kernel.constants)


def _writes_floats(kernel: Kernel, count: int | None) -> bool:
    return any(t.type in FLOATS and t.count == count for t in kernel.outputs)


def _operators(kernel: Kernel) -> str:
    return ", ".join(sorted(kernel.operators)) or kernel.name
