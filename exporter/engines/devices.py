"""Devices that a bundle may be meant for: how much memory they have, and how much of it a model gets.

Compute capabilities: https://developer.nvidia.com/cuda-gpus. Memory is the makers' figure:

- Jetson AGX Orin: NVIDIA data sheet DS-10662-001 v1.8, "Memory Subsystem".
- Jetson Orin NX: NVIDIA data sheet DS-10712-001 v1.0, "Memory".
- Jetson Orin Nano: the module's data sheet.
- GeForce: https://en.wikipedia.org/wiki/GeForce_30_series and the same page of the 20, 40 and 50 series.
- T4, A10, L4, A100: NVIDIA's product pages, https://www.nvidia.com/en-us/data-center/ and their data sheets.
"""

from dataclasses import dataclass

from gemma_export.errors import UsageError

GIB = 1 << 30

CARVED_OUT = 0.12
"""Of a Jetson's memory, that firmware keeps and Linux never sees: an Orin NX of 16 GiB shows CUDA 15.19 GB,
which is 11.6 % less (https://gist.github.com/atinfinity/8cede915acda05d0ff427c09604735dd)."""
SYSTEM_BYTES = 1 * GIB
"""What Linux without a desktop, CUDA and the process take, where CPU and GPU share the memory."""
CONTEXT_BYTES = 3 * GIB // 4
"""What CUDA's context, the kernels and a screen take of a card's own memory."""


@dataclass(frozen=True)
class Device:
    """A device.

    Attributes:
        name: As `--device` takes it.
        memory: Bytes.
        sm: Compute capability, as in 87 for 8.7.
        shared: Whether CPU and GPU share the memory.
    """

    name: str
    memory: int
    sm: int
    shared: bool = False

    @property
    def reserved(self) -> int:
        """Bytes that the system needs."""
        return int(self.memory * CARVED_OUT) + SYSTEM_BYTES if self.shared else CONTEXT_BYTES

    @property
    def available(self) -> int:
        """Bytes for weights, cache and activations."""
        return self.memory - self.reserved


def _jetson(name: str, gib: int) -> Device:
    return Device(name, gib * GIB, 87, shared=True)


def _card(name: str, gib: int, sm: int) -> Device:
    return Device(name, gib * GIB, sm)


_ALL = (
    _jetson("orin-nano-4gb", 4),
    _jetson("orin-nano-8gb", 8),
    _jetson("orin-nx-8gb", 8),
    _jetson("orin-nx-16gb", 16),
    _jetson("agx-orin-32gb", 32),
    _jetson("agx-orin-64gb", 64),
    _card("rtx-2060", 6, 75),
    _card("rtx-3060", 12, 86),
    _card("rtx-3090", 24, 86),
    _card("rtx-4060", 8, 89),
    _card("rtx-4070", 12, 89),
    _card("rtx-4090", 24, 89),
    _card("rtx-5070", 12, 120),
    _card("rtx-5090", 32, 120),
    _card("t4", 16, 75),
    _card("a10", 24, 86),
    _card("l4", 24, 89),
    _card("a100-40gb", 40, 80),
)
DEVICES = {device.name: device for device in _ALL}


def device_named(name: str) -> Device:
    """A device of the table.

    Raises:
        UsageError: It is not there.
    """
    if name not in DEVICES:
        raise UsageError(
            f"There is no device {name!r} in the table.",
            f"Choose one of {', '.join(DEVICES)}, or say what it has with --memory, as in --memory 8GiB.",
        )
    return DEVICES[name]
