"""Time and memory of a build with an engine, and the engine's size against the quantized weights.

    python benchmarks/engines.py                               2B from a bf16 checkpoint: int8 for SM 89
    python benchmarks/engines.py --size 7b                     the same for 7B
    python benchmarks/engines.py --precision int4 --sm 120     another precision, another device
    python benchmarks/engines.py --parity none                 without the gate
    python benchmarks/engines.py --checkpoint FOLDER           of a checkpoint that is there

The weights are random, and scales come from them alone: what is measured is everything but a calibration.
Beside other work the time says little; the processors' own, all of its threads' together, is given too.
Memory is the anonymous part, which a machine must have; pages of mapped files, the checkpoint's and the
graph's, are dropped where they are in the way. It is read from the running process twenty times a second.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from checkpoints import write_checkpoint

from gemma_export.exporter.config import preset

INTERVAL = 0.05
ENGINE_PER_WEIGHTS = 1.02
"""What an engine may take, as a multiple of the weights as they are stored."""


@dataclass(frozen=True)
class Run:
    """A finished build: wall and processor time in seconds, the most anonymous memory in bytes."""

    seconds: float
    processor: float
    anonymous: int


def measure(command: list[str]) -> Run:
    """Runs a command to its end."""
    begin, most = time.perf_counter(), 0
    with subprocess.Popen(command) as process:
        while process.poll() is None:
            most = max(most, anonymous_bytes(process.pid))
            time.sleep(INTERVAL)
    if process.returncode != 0:
        sys.exit(f"{' '.join(command)} failed with status {process.returncode}")
    used = resource.getrusage(resource.RUSAGE_CHILDREN)  # There is one child.
    return Run(time.perf_counter() - begin, used.ru_utime + used.ru_stime, most)


def anonymous_bytes(process: int) -> int:
    """Resident memory of a process that no file stands behind; 0 once it has ended."""
    try:
        lines = Path(f"/proc/{process}/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))


def main() -> None:
    """Measures what the arguments name."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=["tiny", "2b", "7b"], default="2b")
    parser.add_argument("--precision", choices=["fp16", "bf16", "int8", "int4"], default="int8")
    parser.add_argument("--scheme", help="of int8: w8a16 or w8a8")
    parser.add_argument("--sm", default="89")
    parser.add_argument("--max-length", type=int, default=4096)
    parser.add_argument("--max-batch", type=int, default=1)
    parser.add_argument("--parity", choices=["none", "quick", "full"], default="quick")
    parser.add_argument("--checkpoint", type=Path, help="by default one of random weights is written")
    parser.add_argument(
        "--folder", type=Path, default=None, help="where to build; by default a temporary folder"
    )
    arguments = parser.parse_args()
    config = preset(arguments.size)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        checkpoint, bundle = arguments.checkpoint or Path(folder) / "checkpoint", Path(folder) / "bundle"
        if arguments.checkpoint is None:
            write_checkpoint(config, checkpoint)
        build = [sys.executable, "-m", "gemma_export", "build", "--quiet", "--parity", arguments.parity]
        build += ["--target", "rtx", "--sm", arguments.sm, "--precision", arguments.precision]
        build += ["--checkpoint", str(checkpoint), "-o", str(bundle)]
        build += ["--max-length", str(min(arguments.max_length, config.context_length))]
        build += ["--max-batch", str(arguments.max_batch)]
        build += ["--scheme", arguments.scheme] if arguments.scheme else []
        build += ["--no-calibration"] if arguments.precision.startswith("int") else []
        run = measure(build)
        manifest = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
        weights = manifest["bytes"]["weights"]
        print("| build | time | processor | anonymous memory | engine | engine / weights |")
        print("|---|---|---|---|---|---|")
        for engine in manifest["engines"]:
            size = (bundle / engine["file"]).stat().st_size
            verdict = "" if size <= ENGINE_PER_WEIGHTS * weights else ", too large"
            print(
                f"| {arguments.size} {arguments.precision}, SM {', '.join(map(str, engine['sms']))} "
                f"| {run.seconds:.0f} s | {run.processor:.0f} s | {run.anonymous / 2**30:.2f} GiB "
                f"| {size / 1e9:.3f} GB | {size / weights:.4f}{verdict} |"
            )


if __name__ == "__main__":
    main()
