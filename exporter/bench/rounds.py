"""The rounds of a benchmark: in each the machine is measured, then every contestant has its turn.

The machine's speed may drift, and others may use it: what stands in one round was measured within minutes,
and percentages and ratios are taken round by round. Decoding is held against what memory is read with
beside it.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from gemma_export.errors import MissingDependencyError
from gemma_export.exporter import events
from gemma_export.exporter.bench.llama import LlamaBench
from gemma_export.exporter.bench.machine import load_average
from gemma_export.exporter.bench.processes import run_worker
from gemma_export.exporter.bench.values import Machine, Plan, StepParts, Turn
from gemma_export.runtime.bundle import Bundle
from gemma_export.runtime.large_pages import bring_in

OURS = "bundle"
GENAI = "onnxruntime-genai"
_STEP_TOKENS = 16
_BLOCK = 16 << 20


class Contestant(Protocol):
    """Something that can run a plan."""

    def run_turn(self, plan: Plan) -> tuple[Turn, float]:
        """Runs it once, in a process of its own; also how many cores others kept busy meanwhile."""
        ...


@dataclass(frozen=True)
class Worker:
    """A contestant that a worker runs.

    Attributes:
        job: `bundle`, `genai` or `hugging_face`.
        arguments: Of the job, the plan aside.
    """

    job: str
    arguments: Mapping[str, Any]

    def run_turn(self, plan: Plan) -> tuple[Turn, float]:
        """As `Contestant.run_turn`."""
        return run_worker(self.job, {**self.arguments, "plan": plan}, Turn)


@dataclass(frozen=True)
class Round:
    """What was measured together.

    Attributes:
        load_average: Of the machine when the round began.
        machine: What it could do; None where the bundle runs on a device, whose limits these are not.
        turns: Of each contestant, by name.
        others: The most cores that other processes kept busy during a turn.
    """

    load_average: float
    machine: Machine | None
    turns: Mapping[str, Turn]
    others: float


def run_rounds(
    bundle: Bundle, plan: Plan, peers: Mapping[str, Contestant], repeats: int, listener: events.Listener
) -> Iterator[Round]:
    """Runs them; each is given when it is finished, so that one which fails takes none with it.

    Args:
        bundle: What is measured.
        plan: What every contestant runs in a turn.
        peers: What it is compared with, by name.
        repeats: How many rounds.
        listener: Told of progress.

    Raises:
        GemmaExportError: A contestant failed.
    """
    ours = {"path": str(bundle.path), "on_cpu": runs_on_cpu(bundle)}
    contestants: dict[str, Contestant] = {OURS: Worker("bundle", ours), **peers}
    for number in range(1, repeats + 1):
        name = f"round {number}"
        with events.stage(listener, name, "the machine") as facts:
            load = load_average()
            machine = measure_machine(plan.threads) if runs_on_cpu(bundle) else None
            turns, others = {}, 0.0
            for done, (contestant, runner) in enumerate(contestants.items()):
                listener(events.StageProgress(name, done, len(contestants), "turns"))
                _read_files(bundle)
                turns[contestant], busy = runner.run_turn(plan)
                others = max(others, busy)
            facts |= {who: _brief(turn) for who, turn in turns.items()}
        yield Round(load, machine, turns, others)


def runs_on_cpu(bundle: Bundle) -> bool:
    """Whether the memory and the cores of this machine are what limits a bundle."""
    return bundle.manifest.target in ("cpu", "onnx") and not bundle.manifest.engines


def measure_machine(threads: int) -> Machine:
    """What the machine can do now."""
    return run_worker("machine", {"threads": threads}, Machine)[0]


def measure_step(bundle: Bundle, plan: Plan) -> StepParts:
    """Where the time of a decoded token goes, at the smallest depth of the plan that is one.

    Raises:
        GemmaExportError: The bundle cannot be loaded or run.
    """
    tokens = min(_STEP_TOKENS, plan.tokens)
    room = bundle.manifest.graph.max_length - tokens - 1
    depth = max(0, min(next((depth for depth in plan.depths if depth), 16), room))
    arguments = {"path": str(bundle.path), "depth": depth, "tokens": tokens, "threads": plan.threads}
    return run_worker("step", arguments, StepParts)[0]


def peers_of(bundle: Bundle, names: Sequence[str]) -> dict[str, Contestant]:
    """The contestants that were named: `genai`, a checkpoint's folder, or a file that llama.cpp reads.

    Raises:
        MissingDependencyError: What runs one of them is not installed.
        UsageError: There is no such file.
    """
    peers: dict[str, Contestant] = {}
    for name in names:
        if name == "genai":
            _require("onnxruntime_genai", "onnxruntime-genai", "pip install onnxruntime-genai")
            peers[GENAI] = Worker("genai", {"path": str(bundle.path)})
        elif Path(name).is_dir():
            _require("transformers", "transformers", "pip install 'gemma-export[parity]'")
            arguments = {"path": str(bundle.path), "checkpoint": name}
            peers[f"transformers bf16 on {name}"] = Worker("hugging_face", arguments)
        else:
            peers[name] = LlamaBench.find(Path(name))
    return peers


def _require(module: str, package: str, command: str) -> None:
    if find_spec(module) is None:
        raise MissingDependencyError(f"The package {package} is not installed.", f"Install it: {command}")


def _read_files(bundle: Bundle) -> None:
    """Reads a bundle before a turn, so that loading does not measure the disk.

    What another has read since, or a system that gives idle pages back, may have pushed it out.
    """
    for name in bundle.manifest.files:
        bring_in(bundle.file(name))  # As a session does: how it is read first decides.
        with bundle.file(name).open("rb", buffering=0) as file:
            while file.read(_BLOCK):
                pass


def _brief(turn: Turn) -> str | None:
    """The first figure of decoding."""
    return f"{turn.decode[0].per_second:.1f} tokens/s" if turn.decode else None
