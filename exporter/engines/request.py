"""What engines are asked for: frozen, complete, and possible."""

from dataclasses import dataclass
from typing import Literal, get_args

Flavour = Literal["rtx", "tensorrt"]
"""TensorRT for RTX, which builds without a GPU, and TensorRT, which builds on the device."""

FLAVOURS: tuple[Flavour, ...] = get_args(Flavour)


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


def engine_files(request: EngineRequest) -> int:
    """How many engines there will be: SM 75 takes no part in an engine for others."""
    return 2 if 75 in request.sms and len(request.sms) > 1 else 1
