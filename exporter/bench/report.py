"""From rounds to figures: medians, spreads, percentages of what the machine allows, ratios to a peer."""

import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any, Literal

from gemma_export.exporter.bench.limits import bytes_per_token, decode_seconds, prefill_seconds
from gemma_export.exporter.bench.rounds import OURS, Round
from gemma_export.exporter.bench.values import Plan, StepParts, Timing, Turn
from gemma_export.runtime import native
from gemma_export.runtime.manifest import Manifest
from gemma_export.version import __version__

_PACKAGES = ("onnxruntime", "onnxruntime-genai", "numpy")


@dataclass(frozen=True)
class Spread:
    """A quantity in every round.

    Attributes:
        values: In the order of the rounds.
    """

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle one."""
        return median(self.values)

    @property
    def low(self) -> float:
        """The smallest."""
        return min(self.values)

    @property
    def high(self) -> float:
        """The largest."""
        return max(self.values)

    def to_json(self) -> dict[str, Any]:
        """The median, the spread and what they were made of."""
        return {"median": self.median, "low": self.low, "high": self.high, "values": list(self.values)}


@dataclass(frozen=True)
class Figure:
    """A figure of the bundle, and the same of each peer.

    Attributes:
        name: `load`, `first token`, `prefill`, `decode` or `peak memory`.
        at: The length of the prompt, or the depth; None where there is none.
        unit: `s`, `tok/s` or `bytes`.
        ours: Of the bundle.
        limit: The fraction of the machine's limit that it reaches; of memory, the multiple of the bundle's
            size; None where there is no limit or it is not known.
        peers: Of each peer that tells, by name.
        ratios: How many times as fast as each peer the bundle is, or how many times as small.
    """

    name: str
    at: int | None
    unit: str
    ours: Spread
    limit: Spread | None
    peers: Mapping[str, Spread]
    ratios: Mapping[str, Spread]

    def to_json(self) -> dict[str, Any]:
        """The figure as JSON values."""
        return {
            "name": self.name,
            "at": self.at,
            "unit": self.unit,
            **self.ours.to_json(),
            "of_limit": None if self.limit is None else self.limit.to_json(),
            "peers": {
                name: {**spread.to_json(), "ratio": self.ratios[name].to_json()}
                for name, spread in self.peers.items()
            },
        }


@dataclass(frozen=True)
class Host:
    """Where it was measured.

    Attributes:
        processor: As the system calls it.
        system: And its release.
        packages: Versions of what ran, by name.
        kernels: Which of this project's own a CPU's bundle runs on; None where onnxruntime's run.
    """

    processor: str
    system: str
    packages: Mapping[str, str]
    kernels: str | None = None


@dataclass(frozen=True)
class Report:
    """All of a benchmark.

    Attributes:
        bundle: Its folder.
        manifest: What it says of itself.
        host: Where it was measured.
        plan: What was run.
        left_out: What was not, and why.
        rounds: What was measured.
        step: Where the time of a token goes; None where a device runs the graph.
    """

    bundle: Path
    manifest: Manifest
    host: Host
    plan: Plan
    left_out: tuple[str, ...]
    rounds: tuple[Round, ...]
    step: StepParts | None

    @property
    def size(self) -> int:
        """Bytes of the bundle."""
        return sum(entry.size for entry in self.manifest.files.values())

    @property
    def peers(self) -> tuple[str, ...]:
        """Names of what it was compared with."""
        return tuple(name for name in self.rounds[0].turns if name != OURS)

    @property
    def choosing(self) -> float | None:
        """The share of decoding in which tokens are chosen and made text: the median over the rounds."""
        turns = [round_.turns[OURS] for round_ in self.rounds]
        shares = [
            turn.choosing / sum(timing.seconds for timing in turn.decode)
            for turn in turns
            if turn.choosing is not None and turn.decode
        ]
        return median(shares) if shares else None

    def figures(self) -> list[Figure]:
        """All figures, in the order of a run."""
        decode = [self._speed("decode", depth) for depth in self.plan.depths]
        prefill = [self._speed("prefill", length) for length in self.plan.prompts]
        return [self._load(), self._first_token(), *prefill, *decode, self._memory()]

    def machine(self, name: str) -> Spread | None:
        """A rate of the machine: `read`, `floats` or `integers`."""
        rates = [getattr(round_.machine, name) for round_ in self.rounds if round_.machine is not None]
        return None if not rates or None in rates else _spread(rates)

    @property
    def reading(self) -> Spread | None:
        """Bytes per second that memory was read with beside decoding; None where that was not measured."""
        rates = [timing.read for turn in self._turns(OURS) for timing in turn.decode]
        return None if not rates or None in rates else _spread(rate for rate in rates if rate is not None)

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON values."""
        machines = {name: self.machine(name) for name in ("read", "floats", "integers")}
        return {
            "bundle": str(self.bundle),
            "created_by": f"gemma-export {__version__}",
            "model": self.manifest.model.name,
            "precision": self.manifest.precision,
            "scheme": self.manifest.scheme,
            "target": self.manifest.target,
            "host": asdict(self.host),
            "plan": asdict(self.plan),
            "left_out": list(self.left_out),
            "bytes": {
                "bundle": self.size,
                "per_token": {
                    str(depth): round(bytes_per_token(self.manifest, depth)) for depth in self.plan.depths
                },
            },
            "load_average": _json(_spread([round_.load_average for round_ in self.rounds])),
            "others": _json(_spread([round_.others for round_ in self.rounds])),
            "machine": {name: _json(spread) for name, spread in machines.items()},
            "reading": _json(self.reading),
            "read_by": sorted({round_.machine.read_by for round_ in self.rounds if round_.machine}),
            "figures": [figure.to_json() for figure in self.figures()],
            "choosing": self.choosing,
            "step": None if self.step is None else asdict(self.step),
        }

    def _speed(self, name: Literal["prefill", "decode"], at: int) -> Figure:
        def timing(turn: Turn) -> Timing | None:
            return next((timing for timing in getattr(turn, name) if timing.at == at), None)

        rates = {
            who: _all([_of(timing(turn), "per_second") for turn in self._turns(who)])
            for who in self.rounds[0].turns
        }
        shares = self._shares(name, [timing(turn) for turn in self._turns(OURS)])
        return _figure(name, at, "tok/s", rates, shares, larger_is_better=True)

    def _shares(self, name: str, timings: Sequence[Timing | None]) -> list[float] | None:
        """In each round the least time that the machine needs, divided by the time that it took."""
        shares: list[float | None] = []
        for round_, timing in zip(self.rounds, timings, strict=True):
            least = None
            if round_.machine is not None and timing is not None:
                least = (
                    decode_seconds(self.manifest, timing, round_.machine.read)
                    if name == "decode"
                    else prefill_seconds(self.manifest, round_.machine, timing, self.plan.chunk)
                )
            shares.append(least / timing.seconds if least is not None and timing is not None else None)
        return _all(shares)

    def _load(self) -> Figure:
        seconds = {who: _all([turn.load for turn in self._turns(who)]) for who in self.rounds[0].turns}
        return _figure("load", None, "s", seconds, None, larger_is_better=False)

    def _first_token(self) -> Figure:
        seconds = {
            who: _all([_of(turn.first_token, "seconds") for turn in self._turns(who)])
            for who in self.rounds[0].turns
        }
        ours = [turn.first_token for turn in self._turns(OURS)]
        at = max(timing.tokens for timing in ours if timing is not None)
        shares = self._shares("first token", ours)
        return _figure("first token", at, "s", seconds, shares, larger_is_better=False)

    def _memory(self) -> Figure:
        peaks = {who: [float(turn.peak) for turn in self._turns(who)] for who in self.rounds[0].turns}
        multiples = [peak / self.size for peak in peaks[OURS]]
        return _figure("peak memory", None, "bytes", peaks, multiples, larger_is_better=False)

    def _turns(self, who: str) -> list[Turn]:
        return [round_.turns[who] for round_ in self.rounds]


def this_host() -> Host:
    """Where this runs."""
    packages = {}
    for name in _PACKAGES:
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            continue
    return Host(_processor(), f"{platform.system()} {platform.release()}", packages, native.kernels())


def _processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _figure(
    name: str,
    at: int | None,
    unit: str,
    values: Mapping[str, Sequence[float] | None],
    limits: Sequence[float] | None,
    *,
    larger_is_better: bool,
) -> Figure:
    ours = values[OURS]
    assert ours is not None
    peers, ratios = {}, {}
    for who, theirs in values.items():
        if who != OURS and theirs is not None:
            pairs = zip(ours, theirs, strict=True)
            peers[who] = _spread(theirs)
            ratios[who] = _spread([a / b if larger_is_better else b / a for a, b in pairs])
    return Figure(name, at, unit, _spread(ours), None if limits is None else _spread(limits), peers, ratios)


def _of(timing: Timing | None, name: str) -> float | None:
    """A field of a timing, where there is one."""
    return None if timing is None else float(getattr(timing, name))


def _all(values: Iterable[float | None]) -> list[float] | None:
    """The values, where none of them is missing."""
    found = list(values)
    return None if None in found else [value for value in found if value is not None]


def _spread(values: Iterable[float]) -> Spread:
    return Spread(tuple(values))


def _json(spread: Spread | None) -> dict[str, Any] | None:
    return None if spread is None else spread.to_json()
