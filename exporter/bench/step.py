"""Where the time of a decoded token goes: onnxruntime's own clock in the graph, ours around it."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any, Literal

from gemma_export.exporter.bench.bundle import fill
from gemma_export.exporter.bench.plan import real_tokens
from gemma_export.exporter.bench.values import StepParts
from gemma_export.runtime.bundle import open_bundle
from gemma_export.runtime.onnxruntime import OnnxRuntimeBackend
from gemma_export.runtime.options import GenerationOptions
from gemma_export.runtime.sampling import Sampler, SamplingOptions
from gemma_export.runtime.session import Session
from gemma_export.runtime.text_stream import TextStream

Part = Literal["weights", "cache", "others"]

DRAWN = SamplingOptions(temperature=1.0, top_k=64, top_p=0.95, seed=0)
"""How a token is drawn for the part `drawing`: as the model's authors advise."""


@dataclass(frozen=True)
class GraphRun:
    """A run of the graph in a profile, in seconds: all of it, and its operators by what they read."""

    whole: float
    weights: float
    cache: float
    others: float


def measure_step(path: Path, depth: int, tokens: int, threads: int) -> StepParts:
    """Decodes with onnxruntime's profiler.

    The profiler itself takes time at every operator, so the parts are in truth a little smaller.

    Args:
        path: A bundle that onnxruntime runs on a CPU.
        depth: Tokens in the cache.
        tokens: How many are decoded, with so much room behind `depth` that one more fits.
        threads: Within an operator.

    Raises:
        GemmaExportError: It cannot be loaded or run.
    """
    bundle = open_bundle(path, check="quick")
    with TemporaryDirectory() as folder:
        backend = OnnxRuntimeBackend(bundle, threads, profile=Path(folder) / "profile")
        session = Session(bundle, backend)
        ids = real_tokens(session.tokenizer, depth + 1)
        cache = session.new_cache()
        fill(session, cache, ids, depth, GenerationOptions().prefill_chunk)
        greedy, drawing = Sampler(SamplingOptions()), Sampler(DRAWN)
        text = TextStream(session.tokenizer, ())
        token, clocks = ids[depth], []
        for _ in range(tokens + 1):  # The first sets up the buffers and is not counted.
            begin = perf_counter()
            logits = session.step([[token]], cache)
            ran = perf_counter()
            drawing(logits[0, -1], ())
            drawn = perf_counter()
            token = greedy(logits[0, -1], ())
            text.push(token)
            clocks.append((ran - begin, drawn - ran, perf_counter() - drawn))
        events = json.loads(Path(backend.session.end_profiling()).read_text(encoding="utf-8"))
    steps, draws, choices = zip(*clocks[1:], strict=True)
    runs = graph_runs(events)[-tokens:]
    return StepParts(
        depth=depth,
        weights=median(run.weights for run in runs),
        cache=median(run.cache for run in runs),
        others=median(run.others for run in runs),
        between=median(run.whole - run.weights - run.cache - run.others for run in runs),
        around=median(step - run.whole for step, run in zip(steps, runs, strict=True)),
        choosing=median(choices),
        drawing=median(draws),
    )


def graph_runs(events: Sequence[dict[str, Any]]) -> list[GraphRun]:
    """The runs in a profile, in order.

    Args:
        events: What onnxruntime writes: `dur` and `ts` are microseconds, `args` tells an operator's inputs.
    """
    nodes = [event for event in events if event["cat"] == "Node" and event["name"].endswith("_kernel_time")]
    runs = []
    for run in events:
        if run["name"] != "model_run":
            continue
        begin, end = run["ts"], run["ts"] + run["dur"]
        spent: dict[Part, int] = {"weights": 0, "cache": 0, "others": 0}
        for node in nodes:
            if begin <= node["ts"] < end:
                spent[part_of(node["args"])] += node["dur"]
        runs.append(GraphRun(run["dur"] / 1e6, **{part: time / 1e6 for part, time in spent.items()}))
    return runs


def part_of(operator: dict[str, Any]) -> Part:
    """What an operator reads, by the shapes of its inputs.

    Keys and values have four axes of which the third is that of the tokens; a product without any of those is
    one with weights. Small constants on four axes are none, and neither is the row of a lookup.
    """
    shapes = [shape for entry in operator["input_type_shape"] for shape in entry.values()]
    if any(len(shape) == 4 and shape[2] > 1 for shape in shapes):
        return "cache"
    name = operator["op_name"]
    return "weights" if "MatMul" in name or "Gemm" in name else "others"
