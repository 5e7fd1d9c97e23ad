"""Which activations leave the range of fp16, seen over text: those are kept in fp32.

fp16 ends at 65504; what is larger becomes infinite, and everything after it NaN. Gemma's residual stream
grows from layer to layer; which tensors come close depends on the checkpoint and is measured, not assumed.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

FP16_MAX = 65504.0
"""The largest finite fp16 number (IEEE 754 binary16)."""
HEADROOM = 2.0
"""How many times larger than seen an activation must be able to become: a few thousand tokens of text do not
show a tensor's largest value, and a factor of two costs nothing but a few more tensors in fp32."""


@dataclass(frozen=True)
class RangeReport:
    """The largest magnitudes seen.

    Args:
        largest: Tensor name → largest absolute value, in the order the tensors were first seen.
        elements: How many numbers were looked at.
    """

    largest: Mapping[str, float]
    elements: int

    def leaving(self, limit: float = FP16_MAX, headroom: float = HEADROOM) -> list[tuple[str, float]]:
        """Tensors whose largest magnitude times `headroom` is above `limit`, NaN and infinity included."""
        return [(name, peak) for name, peak in self.largest.items() if not peak * headroom <= limit]

    def to_json(self) -> str:
        """JSON text; what is not finite is written as text, since JSON has no number for it."""
        largest = {name: peak if np.isfinite(peak) else str(peak) for name, peak in self.largest.items()}
        return json.dumps({"elements": self.elements, "largest": largest}, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "RangeReport":
        """Reads what `to_json` wrote."""
        data = json.loads(text)
        return cls({name: float(peak) for name, peak in data["largest"].items()}, int(data["elements"]))


class RangeAudit:
    """Collects the largest magnitude of every tensor it is shown: an `observe` callback of the reference.

    >>> audit = RangeAudit()
    >>> audit("layers.0.mlp.product", np.array([3.0, -70000.0], np.float32))
    >>> audit.leaving()
    [('layers.0.mlp.product', 70000.0)]
    """

    def __init__(self) -> None:
        self._largest: dict[str, float] = {}
        self._elements = 0

    def __call__(self, name: str, values: npt.NDArray[np.floating]) -> None:
        """Looks at one tensor of any shape; the array is not kept."""
        if values.size == 0:
            return
        # Two reductions and no copy of the array; both carry a NaN through.
        peak = float(np.maximum(values.max(), -values.min()))
        self._largest[name] = float(np.maximum(self._largest.get(name, 0.0), peak))
        self._elements += values.size

    def report(self) -> RangeReport:
        """What was seen so far."""
        return RangeReport(dict(self._largest), self._elements)

    def leaving(self, limit: float = FP16_MAX, headroom: float = HEADROOM) -> list[tuple[str, float]]:
        """Names and largest magnitudes of the tensors to keep in fp32, as `RangeReport.leaving`."""
        return self.report().leaving(limit, headroom)
