"""Optimization profiles: the steps an engine runs, as data, and the same for `trtexec`.

Prefill and decode have a profile each, because the kernels that are best for many tokens of a row copy what
those for one token read in place. Rows of a batch are prefilled alone and decode together.
"""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gemma_export.errors import UsageError
from gemma_export.exporter.engines.request import EngineRequest
from gemma_export.runtime.manifest import Range, TensorSpec

_ONE = Range(1, 1, 1)
_ENDS = ("min", "opt", "max")


@dataclass(frozen=True)
class Profile:
    """Steps that are compiled together.

    Attributes:
        name: `prefill`, `decode`, or `decode-batch` for more rows than one.
        batch: Rows of a step.
        tokens: Tokens per row of a step.
    """

    name: str
    batch: Range
    tokens: Range

    def shapes(self, shape: Sequence[int | str]) -> tuple[tuple[int, ...], ...]:
        """The least, the best and the largest shape of an input [B, T] or [B, K, S, h].

        Args:
            shape: The input's, with a name where a dimension is free: B on the first axis, T on another.
        """
        return tuple(
            tuple(
                size if isinstance(size, int) else getattr(self.tokens if axis else self.batch, end)
                for axis, size in enumerate(shape)
            )
            for end in _ENDS
        )


def profiles_for(request: EngineRequest, slots: int) -> tuple[Profile, ...]:
    """The profiles of an engine, in its order.

    Args:
        request: Says how many rows and tokens.
        slots: Of the cache.

    Raises:
        UsageError: More tokens are to be run at once than the cache holds.
    """
    chunk = request.prefill_chunk
    if chunk > slots:
        raise UsageError(
            f"A prefill chunk of {chunk} tokens is more than the cache's {slots}.",
            f"Give --prefill-chunk {slots} or less, or a greater --max-length.",
        )
    # A long prompt is run in full chunks: that is what prefill has to be fastest at.
    profiles = [Profile("prefill", _ONE, Range(1, chunk, chunk)), Profile("decode", _ONE, _ONE)]
    if request.max_batch > 1:
        rows = Range(2, request.max_batch, request.max_batch)
        profiles.append(Profile("decode-batch", rows, _ONE))
    return tuple(profiles)


def trtexec_command(
    graph: Path, inputs: Sequence[TensorSpec], profiles: Sequence[Profile], engine: Path
) -> str:
    """The command that compiles a graph on a device where TensorRT is and this project is not.

    Args:
        graph: The ONNX file, beside its weights.
        inputs: The graph's.
        profiles: What the engine is to run.
        engine: Where it is to be written.
    """
    words = ["trtexec", f"--onnx={graph}", f"--saveEngine={engine}", "--stronglyTyped", "--skipInference"]
    for index, profile in enumerate(profiles):
        words.append(f"--profile={index}")
        for end, name in enumerate(_ENDS):
            sizes = (f"{spec.name}:{'x'.join(map(str, profile.shapes(spec.shape)[end]))}" for spec in inputs)
            words.append(f"--{name}Shapes={','.join(sizes)}")
    return shlex.join(words)
