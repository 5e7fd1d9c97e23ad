"""Peak memory and time of a build, next to copying the same bytes on the same disk.

    python benchmarks/build.py               2B: fp32 from random weights, bf16 → fp16 from a checkpoint
    python benchmarks/build.py --size 7b     the same for 7B

The build and the copy run in turns (A B A B …), each in a process of its own, and the ratio is taken pair by
pair: the machine's speed may drift, both halves of a pair see the same. Memory is the operating system's own
count of the finished process (`ru_maxrss`), mapped files included. Where the disk has no room for a copy,
only the build is measured.
"""

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from checkpoints import write_checkpoint

from gemma_export.exporter.config import preset

BUILD = [sys.executable, "-m", "gemma_export", "build", "--quiet", "--parity", "none", "--force"]


@dataclass(frozen=True)
class Run:
    """A finished process: wall time in seconds, peak resident memory in bytes."""

    seconds: float
    peak: int


def measure(command: list[str]) -> Run:
    """Runs a command to its end."""
    begin = time.perf_counter()
    process = os.posix_spawnp(command[0], command, os.environ)
    _, status, usage = os.wait4(process, 0)
    if status != 0:
        sys.exit(f"{' '.join(command)} failed with status {status}")
    return Run(time.perf_counter() - begin, usage.ru_maxrss * 1024)


def compare(name: str, build: list[str], bundle: Path, rounds: int) -> None:
    """Builds and copies in turns, and prints one row."""
    copy = bundle.with_name("copy")
    builds: list[Run] = []
    ratios: list[float] = []
    for _ in range(rounds):
        shutil.rmtree(bundle, ignore_errors=True)
        os.sync()  # What an earlier run left unwritten must not be paid for by this one.
        builds.append(measure([*build, "-o", str(bundle)]))
        size = (bundle / "model.onnx.data").stat().st_size
        if shutil.disk_usage(bundle).free > size:
            os.sync()
            ratios.append(
                builds[-1].seconds / measure(["cp", str(bundle / "model.onnx.data"), str(copy)]).seconds
            )
            copy.unlink()
    shutil.rmtree(bundle)
    seconds = statistics.median(run.seconds for run in builds)
    peak = max(run.peak for run in builds) / 2**30
    against = "no room for a copy"
    if ratios:
        against = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    print(f"| {name} | {size / 1e9:.2f} GB | {seconds:.1f} s | {against} | {peak:.2f} GiB |", flush=True)


def main() -> None:
    """Measures what the arguments name."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=["tiny", "2b", "7b"], default="2b")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=["fp32", "fp16"], help="one of the two rows")
    parser.add_argument(
        "--folder", type=Path, default=None, help="where to build; by default a temporary folder"
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        bundle = Path(folder) / "bundle"
        print("| build | bytes | time | time / time of cp | peak RSS |\n|---|---|---|---|---|", flush=True)
        if arguments.only != "fp16":
            build = [*BUILD, "--size", arguments.size, "--random-weights", "--precision", "fp32"]
            compare(f"{arguments.size} fp32, random weights", build, bundle, arguments.rounds)
        if arguments.only != "fp32":
            checkpoint = Path(folder) / "checkpoint"
            write_checkpoint(preset(arguments.size), checkpoint)
            build = [*BUILD, "--size", arguments.size, "--checkpoint", str(checkpoint), "--precision", "fp16"]
            compare(f"{arguments.size} bf16 → fp16", build, bundle, arguments.rounds)


if __name__ == "__main__":
    main()
