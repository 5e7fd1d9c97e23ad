"""How far a shipped model is from its reference for every target, in every precision without scales.

    python benchmarks/parity.py [--size tiny|tiny2] [--level quick|full]

Builds each bundle in a temporary folder and prints what its gate measured. Speed is not measured here.
"""

import argparse
import tempfile
from pathlib import Path

from gemma_export.exporter.config import SHIPPED
from gemma_export.exporter.pipeline import build
from gemma_export.exporter.request import SCHEMES, BuildRequest


def main() -> None:
    """Prints one row for each scheme."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SHIPPED, default="tiny")
    parser.add_argument("--level", choices=["quick", "full"], default="full")
    arguments = parser.parse_args()
    print(
        "| target | precision | tokens | largest error | mean KL | same first choice | perplexity | verdict |"
    )
    print("|---|---|---|---|---|---|---|---|", flush=True)
    floating = [key for key, (scheme, *_) in SCHEMES.items() if scheme.products is None]
    with tempfile.TemporaryDirectory() as folder:
        for target, precision in floating:
            request = BuildRequest(
                output=Path(folder) / f"{target}-{precision}",
                size=arguments.size,
                target=target,
                precision=precision,
                parity=arguments.level,
                allow_parity_failure=True,
            )
            report = build(request).report
            assert report is not None
            figures = report.figures
            change = figures.perplexity_change
            print(
                f"| {target} | {precision} | {figures.tokens} | {figures.max_relative_error:.1e} "
                f"| {figures.mean_kl:.1e} | {figures.top1_agreement:.2%} "
                f"| {'' if change is None else f'{change:+.4%}'} | {report.verdict} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
