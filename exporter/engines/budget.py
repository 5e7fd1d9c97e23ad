"""Whether a model fits a device's memory, before anything is built.

    weights + cache + activations <= what the device has for them

Weights and cache follow from the shape. Activations are estimated: TensorRT lets tensors whose lives do not
overlap share memory, sizes each profile for its largest step, and an engine for its largest profile
(https://nvidia.github.io/TensorRT-LLM/reference/memory.html). Counted are the tensors that live at once in
the widest part of a step of T tokens in B rows, with S slots, in bytes of 2 where not said otherwise:

    mask            B · T · S, for as long as the step takes
    residual        B · T · d, in 2 and in 4 bytes
    attention       B · T · (H + 2K) · h, and K and V repeated for every query head, 2 · H · S · h, in prefill
    or in parts     with a soft-cap: B · T · H · S in 6 bytes, and K and V turned, 2 · K · S · h, in prefill
    or the MLP      B · T · 3f: gate, up and their product
    logits          V in 2 and in 4 bytes for each row, or for each token where all are asked for
    workspace       8 MiB, which plans of any size have; twice that with attention in parts

Engines of TensorRT for RTX 1.7 say that they need, in MiB: 61.5 for 512 tokens at 2B's width with 2048 slots,
where 64.2 is estimated; 10.2 for 256 tokens of the model that ships (10.0); for a token of either 7.9 and 7.8
(8.3 and 8.0). With attention in parts, 224.8 for 512 tokens at Gemma 2 2B's width with 8192 slots (258.8),
224.4 for 256 tokens at 27B's with 4096 (252.8); for a token of either 15.9 and 16.2.

What an engine was really built with stands in its manifest, by profile, and `inspect` shows it.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from gemma_export.errors import UsageError
from gemma_export.exporter.config import GemmaConfig
from gemma_export.exporter.engines.devices import DEVICES, GIB, Device
from gemma_export.exporter.engines.request import rtx_compiles
from gemma_export.exporter.schemes import PRECISIONS, SCHEMES, Scheme
from gemma_export.runtime.kv_cache import layer_slots
from gemma_export.runtime.rolling import RollingCache

_HALF, _FLOAT = 2, 4
_SCORE = 6
"""Of 2B's heads over 8192 slots TensorRT for RTX 1.7 asks for 4.5 (128 tokens) to 5.7 (512 tokens)."""
_WORKSPACE = 8 << 20
_STEP = 64
"""A cache's length that is offered is a multiple of this."""
_SHORTEST_CHUNK = 16
"""In shorter parts than this, a prompt would take as long as if it were decoded."""
_SHORTEST = 256
"""And no less: a cache that holds no answer is no offer."""


@dataclass(frozen=True)
class MemoryPlan:
    """What will be in a device's memory.

    Attributes:
        config: The model.
        target: What it is built for, a key of `SCHEMES` with `precision`.
        precision: Likewise.
        scheme: How the target keeps it.
        block: Columns of a weight that share a scale, where the scheme has a choice; None takes its default.
        slots: Of a row of the cache.
        rows: The most that decode together.
        chunk: The most tokens of a row that are run at once.
        all_logits: Whether the logits of all tokens are computed.
        decomposed: Whether attention is made of products and a softmax, with its scores in memory.
        rolling: Which caches roll; None where each has `slots`.
        sms: Compute capabilities that it must run on; none where that is open.
    """

    config: GemmaConfig
    target: str
    precision: str
    scheme: Scheme
    slots: int
    rows: int = 1
    chunk: int = 512
    block: int | None = None
    all_logits: bool = False
    decomposed: bool = False
    rolling: RollingCache | None = None
    sms: tuple[int, ...] = ()

    @property
    def weights(self) -> int:
        """Bytes of the weights, with their scales, and of the rotary tables."""
        rotary = self.slots * self.config.head_dim * _FLOAT
        return rotary + sum(self._weight(name, shape) for name, shape in self.config.weight_shapes.items())

    @property
    def cache(self) -> int:
        """Bytes of keys and values of all rows."""
        c = self.config
        slots = sum(min(size, self.slots) for size in layer_slots(c.num_layers, self.slots, self.rolling))
        return 2 * slots * c.num_kv_heads * c.head_dim * self.rows * _HALF

    @property
    def activations(self) -> int:
        """Bytes of everything between weights and logits, in a chunk of one row or a decode of all."""
        return max(self._step(1, self.chunk), self._step(self.rows, 1))

    @property
    def total(self) -> int:
        """Bytes in all."""
        return self.weights + self.cache + self.activations

    def _weight(self, name: str, shape: tuple[int, ...]) -> int:
        if len(shape) == 1:
            return shape[0] * _HALF
        rows, columns = shape
        products = self.scheme.products
        if products is None:
            return rows * columns * _HALF
        if products.bits == 8 or name == "embed_tokens.weight":
            return rows * (columns + _FLOAT)
        block = self.block or products.blocks[0] or columns
        return rows * columns // 2 + rows * -(-columns // block) * _HALF

    def _step(self, rows: int, tokens: int) -> int:
        c = self.config
        heads = (c.num_query_heads + 2 * c.num_kv_heads) * c.head_dim
        copied = c.num_kv_heads if self.decomposed else c.num_query_heads
        copies = 2 * copied * self.slots * c.head_dim if tokens > 1 else 0
        scores = c.num_query_heads * self.slots if self.decomposed else 0
        attention = rows * tokens * (heads * _HALF + scores * _SCORE) + copies * _HALF
        mlp = rows * tokens * 3 * c.intermediate_size * _HALF
        steady = rows * tokens * (self.slots * _HALF + c.hidden_size * (_HALF + _FLOAT))
        logits = rows * (tokens if self.all_logits else 1) * c.vocab_size * (_HALF + _FLOAT)
        return steady + max(attention, mlp) + logits + (1 + self.decomposed) * _WORKSPACE


def check_memory(plan: MemoryPlan, device: Device | None, memory: int | None) -> None:
    """Refuses what does not fit.

    Args:
        plan: What is to be built.
        device: Where it is to run; None where that was not said.
        memory: Bytes there are for it; None takes what the device leaves.

    Raises:
        UsageError: It does not fit; the hint names what would.
    """
    if memory is None and device is None:
        return
    available = memory if memory is not None else device.available if device is not None else 0
    if plan.total <= available:
        return
    where = "--memory gives it" if memory is not None else f"{plan_device(device)} leaves it"
    raise UsageError(
        f"{plan.config.name} in {plan.precision} needs {gib(plan.total)}, and {where} {gib(available)}: "
        f"weights {gib(plan.weights)}, a cache of {plan.slots:,} tokens"
        f"{f' in {plan.rows} rows' if plan.rows > 1 else ''} {gib(plan.cache)}, activations about "
        f"{gib(plan.activations)}.",
        _hint(plan, available),
    )


def plan_device(device: Device | None) -> str:
    """A device with what it has and what the system needs of it."""
    if device is None:
        return ""
    return f"{device.name} ({gib(device.memory)}, {gib(device.reserved)} of them for the system)"


def gib(count: int) -> str:
    """Bytes as GiB, or as MiB where that is less than one."""
    return f"{count / GIB:.2f} GiB" if count >= GIB else f"{count / (1 << 20):.2f} MiB"


def devices_for(total: int, sms: tuple[int, ...] = ()) -> tuple[Device, ...]:
    """The devices of the table that so many bytes fit, of those compute capabilities where some are given."""
    return tuple(d for d in DEVICES.values() if total <= d.available and (not sms or d.sm in sms))


def _runs(plan: MemoryPlan, sm: int) -> bool:
    """Whether the target's engines run there in the plan's precision."""
    return plan.target != "rtx" or rtx_compiles(plan.precision, sm)


def _hint(plan: MemoryPlan, available: int) -> str:
    ways = list(_ways(plan, available))
    if ways:
        return f"A build that would fit has {', or '.join(ways)}."
    smallest = min((plan, *_smaller(plan)), key=lambda other: other.weights)
    smallest = replace(smallest, slots=_SHORTEST, rows=1, chunk=min(plan.chunk, _SHORTEST))
    fitting = [device for device in devices_for(smallest.total) if _runs(smallest, device.sm)]
    if not fitting:
        return "Take a smaller --size."
    return (
        f"Nothing of {plan.config.name} fits there: --precision {smallest.precision} needs "
        f"{gib(smallest.total)}, which {fitting[0].name} has."
    )


def _ways(plan: MemoryPlan, available: int) -> Iterator[str]:
    """Options that would fit: one change each, then a smaller precision with a shorter cache."""
    if plan.rows > 1 and (rows := _most_rows(plan, available)):
        yield f"--max-batch {rows}"
    if chunk := _largest_chunk(plan, available):
        yield f"--prefill-chunk {chunk}"
    if slots := _longest(plan, available):
        yield f"--max-length {slots}"
    for smaller in _smaller(plan):
        if smaller.total <= available:
            yield f"--precision {smaller.precision}"
        elif slots := _longest(smaller, available):
            yield f"--precision {smaller.precision} --max-length {slots}"


def _most_rows(plan: MemoryPlan, available: int) -> int:
    return next(
        (rows for rows in range(plan.rows - 1, 0, -1) if replace(plan, rows=rows).total <= available), 0
    )


def _largest_chunk(plan: MemoryPlan, available: int) -> int:
    """The longest part of a prompt that fits, halved until it does; 0 where none worth having does."""
    chunk = plan.chunk // 2
    while chunk >= _SHORTEST_CHUNK:
        if replace(plan, chunk=chunk).total <= available:
            return chunk
        chunk //= 2
    return 0


def _longest(plan: MemoryPlan, available: int) -> int:
    """The longest cache that fits, in steps; 0 where none worth having does."""
    for slots in range((plan.slots - 1) // _STEP * _STEP, _SHORTEST - 1, -_STEP):
        if replace(plan, slots=slots, chunk=min(plan.chunk, slots)).total <= available:
            return slots
    return 0


def _smaller(plan: MemoryPlan) -> Iterator[MemoryPlan]:
    """The same in every precision whose weights are smaller, of those that run where the plan's must."""
    for precision in PRECISIONS:
        for scheme in SCHEMES.get((plan.target, precision), ())[:1]:
            smaller = replace(plan, precision=precision, scheme=scheme, block=None)
            if smaller.weights < 0.95 * plan.weights and all(_runs(smaller, sm) for sm in plan.sms):
                yield smaller
