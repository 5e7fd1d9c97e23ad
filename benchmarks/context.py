"""What a longer cache costs a token that does not use it: decoding at one depth, in caches of two lengths.

    python benchmarks/context.py                              2B's width, 4 layers, int8
    python benchmarks/context.py --precision int4 --depth 256

Both bundles have the same random weights and run the same tokens. They run in turns (A B A B …), each in a
process of its own, and the ratio is taken pair by pair. Wanted is a median below 1.05, whatever the depth.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from checkpoints import write_checkpoint

from gemma_export.exporter.bench.plan import physical_cores
from gemma_export.exporter.bench.rounds import Worker
from gemma_export.exporter.bench.values import Plan
from gemma_export.exporter.config import preset

WANTED = 1.05


def build(checkpoint: Path, output: Path, precision: str, target: str, max_length: int) -> Path:
    """Builds a bundle with a cache of so many tokens."""
    command = [sys.executable, "-m", "gemma_export", "build", "--quiet", "--parity", "none"]
    command += ["--checkpoint", str(checkpoint), "--precision", precision, "--target", target]
    command += ["--max-length", str(max_length), "-o", str(output)]
    command += ["--no-calibration"] if precision.startswith("int") else []
    subprocess.run(command, check=True)
    return output


def main() -> None:
    """Measures what the arguments name."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=["2b", "7b", "gemma2-2b"], default="2b", help="whose width it has")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--precision", choices=["fp32", "fp16", "int8", "int4"], default="int8")
    parser.add_argument("--target", choices=["cpu", "onnx"], default="cpu")
    parser.add_argument("--depth", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--short", type=int, default=512)
    parser.add_argument("--long", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--folder", type=Path, default=None, help="where to build; by default a temporary folder"
    )
    arguments = parser.parse_args()
    plan = Plan((), (arguments.depth,), arguments.tokens, 256, physical_cores())
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        checkpoint = Path(folder) / "checkpoint"
        write_checkpoint(replace(preset(arguments.size), num_layers=arguments.layers), checkpoint)
        lengths = (arguments.short, arguments.long)
        folders = [
            build(checkpoint, Path(folder) / f"{n}", arguments.precision, arguments.target, n)
            for n in lengths
        ]
        contestants = [Worker("bundle", {"path": str(path), "on_cpu": True}) for path in folders]
        pairs: list[list[float]] = []
        for _ in range(arguments.rounds):
            turns = [contestant.run_turn(plan)[0] for contestant in contestants]
            pairs.append([turn.decode[0].seconds / turn.decode[0].tokens for turn in turns])
        peaks = [turn.peak for turn in turns]
    print("| cache | ms per token, median (from, to) | peak memory |\n|---|---|---|")
    for length, seconds, peak in zip(lengths, zip(*pairs, strict=True), peaks, strict=True):
        low, middle, high = (1e3 * x for x in (min(seconds), statistics.median(seconds), max(seconds)))
        print(f"| {length:,} | {middle:.2f} ({low:.2f}, {high:.2f}) | {peak / 1e9:.2f} GB |")
    ratios = [long / short for short, long in pairs]
    middle = statistics.median(ratios)
    print(
        f"\nat depth {arguments.depth}: {middle:.3f} times as long ({min(ratios):.3f} to {max(ratios):.3f})"
    )
    print("as wanted" if middle <= WANTED else f"not as wanted: above {WANTED}")


if __name__ == "__main__":
    main()
