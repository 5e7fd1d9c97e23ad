"""A plan's kernels, from the list that TensorRT logs of them.

The list is for people, a line per kernel:

    Name: …_myl1_3, LayerType: gemm, Inputs: [ { Name: x, Dimensions: [1,-1,256], …, Datatype: Half, … }],
    Constants: [ … ], Outputs: [ … ], TacticName: …, StreamId: 0, Metadata: [ONNX Layer: …][ONNX Layer: …]

The number behind `_myl` is that of the profile. TensorRT without a GPU has no other way to look into a plan.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from gemma_export.errors import EngineError

_LIST = "Layers:"
_UNREAD = "Unused Input:"
_KERNEL = re.compile(
    r"Name: (?P<name>.*?), LayerType: (?P<kind>\w+), Inputs: (?P<inputs>.*?), "
    r"(?:Constants: (?P<constants>.*?), )?Outputs: (?P<outputs>.*?), TacticName: .*?"
    r"Metadata:(?P<metadata>.*)$"
)
_TENSOR = re.compile(r"\{ Name: (.*?), Dimensions: \[([\d,-]*)\].*?Datatype: (\w+)")
_PROFILE = re.compile(r"_myl(\d+)_\d+$")
_PROFILE_SUFFIX = re.compile(r" \[profile \d+\]")
_OPERATOR = re.compile(r"\[ONNX Layer: ([^\]]*)\]")
_NO_KERNELS = ("shape_call", "signal", "wait")
_UNREADABLE = "This release of gemma-export cannot audit what that TensorRT builds: install another."


@dataclass(frozen=True)
class PlanTensor:
    """What a kernel reads or writes.

    Attributes:
        name: Without the profile's number.
        count: Its numbers; None where a dimension is free.
        type: As TensorRT calls it: `Half`, `BFloat16`, `Float`, `Int8`, `Int4`, ...
    """

    name: str
    count: int | None
    type: str


@dataclass(frozen=True)
class Kernel:
    """One kernel of a plan.

    Attributes:
        name: TensorRT's.
        kind: `gemm`, `kgen` (made for this graph), `runtime_fusion`, ...
        profile: Index of its optimization profile.
        inputs: What it reads of other kernels, and of the caller.
        constants: What it reads of the weights.
        outputs: What it writes.
        operators: The ONNX nodes it computes, by name.
    """

    name: str
    kind: str
    profile: int
    inputs: tuple[PlanTensor, ...]
    constants: tuple[PlanTensor, ...]
    outputs: tuple[PlanTensor, ...]
    operators: frozenset[str]

    @property
    def is_attention(self) -> bool:
        """Whether it computes a whole attention: scores, softmax and values."""
        return "_mha_" in self.name

    @property
    def shown_kind(self) -> str:
        """Its kind for people: fused attention by its own name."""
        return self.name[: self.name.index("_myl")].strip("_") if self.is_attention else self.kind


@dataclass(frozen=True)
class PlanText:
    """What TensorRT said of a plan.

    Attributes:
        kernels: All of them, in their order.
        weight_bytes: Device memory of the weights.
        activation_bytes: Device memory a step needs, by profile.
        unread: Inputs that no kernel reads, by name.
    """

    kernels: tuple[Kernel, ...]
    weight_bytes: int
    activation_bytes: tuple[int, ...]
    unread: tuple[str, ...] = ()


def read_plan(log: Sequence[str]) -> PlanText:
    """Reads a build's log.

    Raises:
        EngineError: There is no list of kernels in it, or not in the form this module knows.
    """
    lists = [message for message in log if message.startswith(_LIST)]
    weights, activations = _bytes(log, "Total Weights Memory"), _bytes(log, "Total Activation Memory")
    if len(lists) != 1 or len(weights) != 1 or not activations:
        raise EngineError("TensorRT does not say what it built.", _UNREADABLE)
    text = lists[0].removeprefix(_LIST)
    lines = (line.strip() for line in text.splitlines())
    kernels = tuple(_kernel(line) for line in lines if ", LayerType: " in line)
    return PlanText(
        tuple(kernel for kernel in kernels if kernel.kind not in _NO_KERNELS),
        weights[0],
        activations,
        tuple(m.removeprefix(_UNREAD).strip() for m in log if m.startswith(_UNREAD)),
    )


def _kernel(line: str) -> Kernel:
    match = _KERNEL.match(line)
    profile = None if match is None else _PROFILE.search(match["name"])
    if match is None or profile is None:
        raise EngineError(f"TensorRT describes a kernel in an unknown way: {line[:200]}.", _UNREADABLE)
    return Kernel(
        match["name"],
        match["kind"],
        int(profile[1]),
        _tensors(match["inputs"]),
        _tensors(match["constants"] or ""),
        _tensors(match["outputs"]),
        frozenset(_OPERATOR.findall(match["metadata"])),
    )


def _tensors(text: str) -> tuple[PlanTensor, ...]:
    return tuple(
        PlanTensor(_PROFILE_SUFFIX.sub("", name), _count(dimensions), kind)
        for name, dimensions, kind in _TENSOR.findall(text)
    )


def _count(dimensions: str) -> int | None:
    sizes = [int(size) for size in dimensions.split(",") if size]
    return None if any(size < 0 for size in sizes) else math.prod(sizes)


def _bytes(log: Sequence[str], what: str) -> tuple[int, ...]:
    """What a message says of bytes, each time it does."""
    found = (re.match(rf"{what}: (\d+) bytes", message) for message in log)
    return tuple(int(match[1]) for match in found if match is not None)
