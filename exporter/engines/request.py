"""What engines are asked for: frozen, complete, and possible."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal, get_args

from gemma_export.errors import UsageError
from gemma_export.graphs.formats import TURING

Flavour = Literal["rtx", "tensorrt"]
"""TensorRT for RTX, which builds without a GPU, and TensorRT, which builds on the device."""

FLAVOURS: tuple[Flavour, ...] = get_args(Flavour)

RTX_SMS = (TURING, 80, 86, 89, 120, 121)
"""Compute capabilities that TensorRT for RTX compiles for; an Orin (87) and an H100 (90) are none of them."""

# Turing's tensor cores have no bfloat16, and no kernel unpacks 4 bits for them.
NOT_ON_TURING = {"BFloat16": "bf16", "Int4": "int4"}


@dataclass(frozen=True)
class EngineRequest:
    """Engines for one bundle.

    Attributes:
        flavour: What compiles them.
        sms: Compute capabilities they must run on, as in 89 for 8.9; none takes the flavour's default.
        max_batch: The most rows that decode together.
        prefill_chunk: The most tokens of a row that are run at once.
    """

    flavour: Flavour
    sms: tuple[int, ...] = ()
    max_batch: int = 1
    prefill_chunk: int = 512

    def __post_init__(self) -> None:
        if self.flavour not in FLAVOURS:
            raise UsageError(f"Nothing compiles for {self.flavour}.", f"Choose {' or '.join(FLAVOURS)}.")
        if self.flavour == "tensorrt" and self.sms:
            raise UsageError(
                "TensorRT compiles for the GPU of the machine it runs on, and for no other.",
                "Leave the compute capability out, or take the flavour rtx.",
            )
        for sm in self.sms:
            if sm not in RTX_SMS:
                raise UsageError(
                    f"TensorRT for RTX does not compile for SM {sm}.",
                    f"Choose from {', '.join(map(str, RTX_SMS))}; for any other GPU compile on the device, "
                    "with the flavour tensorrt.",
                )
        if self.max_batch < 1:
            raise UsageError(f"A batch of {self.max_batch} leaves nothing to run.", "Give at least 1.")
        if self.prefill_chunk < 1:
            raise UsageError(
                f"A prefill chunk of {self.prefill_chunk} tokens leaves nothing to run.", "Give at least 1."
            )


def plans_of(request: EngineRequest) -> tuple[tuple[int, ...], ...]:
    """The compute capabilities that share a plan, for TensorRT for RTX.

    From 80 on one plan has the same kernels and the same size as one for each; with 75 among them all would
    have to make do with what it can.
    """
    sms = tuple(sorted(set(request.sms))) or tuple(sm for sm in RTX_SMS if sm != TURING)
    turing, others = sms[: TURING in sms], tuple(sm for sm in sms if sm != TURING)
    return tuple(plan for plan in (turing, others) if plan)


def check_types(sms: Collection[int], types: Collection[str]) -> None:
    """Refuses a device that has no arithmetic for a graph.

    Args:
        sms: Compute capabilities of the devices.
        types: Of the graph's inputs and weights, as TensorRT calls them.

    Raises:
        UsageError: One of them cannot run it.
    """
    lacking = sorted(NOT_ON_TURING.keys() & set(types))
    if TURING in sms and lacking:
        raise UsageError(
            f"SM {TURING} does not run {NOT_ON_TURING[lacking[0]]}.",
            "Build the bundle with --precision int8 or fp16, or compile it for an SM from 80 upwards.",
        )


def rtx_compiles(precision: str, sm: int) -> bool:
    """Whether TensorRT for RTX compiles a precision for a compute capability."""
    return sm in RTX_SMS and (sm != TURING or precision not in NOT_ON_TURING.values())


def engine_files(request: EngineRequest) -> int:
    """How many engines there will be."""
    return len(plans_of(request)) if request.flavour == "rtx" else 1
