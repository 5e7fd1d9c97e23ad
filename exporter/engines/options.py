"""What a person may say about engines, and the request that it becomes."""

import re
from dataclasses import dataclass, fields

from gemma_export.errors import UsageError
from gemma_export.exporter.engines.devices import Device, device_named
from gemma_export.exporter.engines.request import (
    FLAVOURS,
    RTX_SMS,
    EngineRequest,
    Flavour,
    rtx_compiles,
)

PREFILL_CHUNK = 512
"""Tokens that are run at once, where a cache has room for as many."""

_UNITS = {"": 1, "MB": 10**6, "GB": 10**9, "MIB": 1 << 20, "GIB": 1 << 30}


@dataclass(frozen=True)
class EngineOptions:
    """How engines are to be built, as far as it was said.

    Attributes:
        sms: Compute capabilities they must run on, as in 89 for 8.9.
        max_batch: The most rows that decode together; None takes 1.
        prefill_chunk: The most tokens of a row that are run at once; None takes 512, or the cache's length.
        device: A name in the table of devices.
        memory: Bytes for weights, cache and activations, instead of what the table leaves.
    """

    sms: tuple[int, ...] = ()
    max_batch: int | None = None
    prefill_chunk: int | None = None
    device: str | None = None
    memory: int | None = None

    def __post_init__(self) -> None:
        for option, value in (("--max-batch", self.max_batch), ("--prefill-chunk", self.prefill_chunk)):
            if value is not None and value < 1:
                raise UsageError(f"{option} {value} leaves nothing to run.", "Give at least 1.")
        if self.memory is not None and self.memory < 1:
            raise UsageError("--memory leaves no room at all.", "Say how much there is, as in --memory 8GiB.")
        if self.device is not None:
            device_named(self.device)

    @property
    def given(self) -> tuple[str, ...]:
        """The options that were given, as they are typed."""
        return tuple(_TYPED[f.name] for f in fields(self) if getattr(self, f.name) != f.default)

    @property
    def known_device(self) -> Device | None:
        """The device that was named."""
        return None if self.device is None else device_named(self.device)

    @property
    def rows(self) -> int:
        """The most rows that decode together."""
        return self.max_batch or 1

    def chunk(self, slots: int) -> int:
        """The most tokens of a row that are run at once, with a cache of so many slots."""
        return self.prefill_chunk or min(PREFILL_CHUNK, slots)

    def check(self, target: str, precision: str) -> None:
        """Refuses what cannot be built for a target in a precision.

        Raises:
            UsageError: The target compiles nothing, or not for that device, or that precision not for it.
        """
        if target not in FLAVOURS:
            if self.given:
                raise UsageError(
                    f"{self.given[0]} is about engines, and the target {target} compiles none.",
                    f"Leave {self.given[0]} out, or take --target rtx.",
                )
            return
        device = self.known_device
        if target == "tensorrt":
            if self.sms:
                raise UsageError(
                    "--sm is for --target rtx: TensorRT compiles for the GPU of the machine it runs on.",
                    "Leave --sm out, or take --target rtx.",
                )
            return
        for sm in self.sms:
            _check_sm(sm, precision)
        if device is None:
            return
        if device.sm not in RTX_SMS:
            raise UsageError(
                f"TensorRT for RTX does not compile for {device.name}, which is SM {device.sm}.",
                "Take --target onnx here, and `gemma-export compile BUNDLE --target tensorrt` on the device.",
            )
        if self.sms and device.sm not in self.sms:
            raise UsageError(
                f"{device.name} is SM {device.sm}, and --sm asks for {', '.join(map(str, self.sms))}.",
                f"Leave --sm out, or add --sm {device.sm}.",
            )
        _check_sm(device.sm, precision)

    def check_chunk(self, slots: int) -> None:
        """Refuses a prefill chunk that the cache has no room for.

        Raises:
            UsageError: It is larger than the cache.
        """
        if self.prefill_chunk is not None and self.prefill_chunk > slots:
            raise UsageError(
                f"--prefill-chunk {self.prefill_chunk} is more than the {slots} tokens that the cache holds.",
                f"Give at most {slots}, or build with a greater --max-length.",
            )

    def request(self, flavour: Flavour, slots: int) -> EngineRequest:
        """The request for a graph with a cache of so many slots.

        Raises:
            UsageError: The prefill chunk is larger than that.
        """
        self.check_chunk(slots)
        device = self.known_device
        sms = self.sms or ((device.sm,) if device is not None and flavour == "rtx" else ())
        return EngineRequest(flavour, sms, self.rows, self.chunk(slots))


_TYPED = {
    "sms": "--sm",
    "max_batch": "--max-batch",
    "prefill_chunk": "--prefill-chunk",
    "device": "--device",
    "memory": "--memory",
}


def _check_sm(sm: int, precision: str) -> None:
    choices = ", ".join(map(str, RTX_SMS))
    if sm not in RTX_SMS:
        raise UsageError(
            f"TensorRT for RTX does not compile for SM {sm}.",
            f"Choose from {choices}; for any other GPU take --target onnx, and `gemma-export compile BUNDLE "
            "--target tensorrt` on the device.",
        )
    if not rtx_compiles(precision, sm):
        raise UsageError(
            f"SM {sm} does not run {precision}.",
            "Take --precision int8 or fp16, or an --sm from 80 upwards.",
        )


def read_sms(texts: list[str] | None) -> tuple[int, ...]:
    """Compute capabilities as they are typed, once each, in their order: `86`, `8.6`, `sm_86`, `86,89`.

    Raises:
        UsageError: One is no number.
    """
    sms = []
    for text in (part.strip() for given in texts or () for part in given.split(",")):
        digits = re.fullmatch(r"(?:sm_?)?(\d+)\.?(\d)", text, re.IGNORECASE)
        if digits is None:
            raise UsageError(
                f"--sm {text} is no compute capability.", "Write 89 for 8.9; several as in --sm 86,89."
            )
        sms.append(int("".join(digits.groups())))
    return tuple(sorted(set(sms)))


def read_memory(text: str | None) -> int | None:
    """An amount of memory as it is typed, in bytes: `8GiB`, `7.5 GB`, `6144MiB`.

    Raises:
        UsageError: It is none.
    """
    if text is None:
        return None
    parts = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if parts is None or parts.group(2).upper() not in _UNITS:
        raise UsageError(f"--memory {text} is no amount of memory.", "Write it as 8GiB, 8GB or 6144MiB.")
    return int(float(parts.group(1)) * _UNITS[parts.group(2).upper()])
