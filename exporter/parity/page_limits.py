"""What a parity report does not show, said in the report itself."""

from gemma_export.exporter.parity.compare import CACHE_POSITIONS
from gemma_export.exporter.parity.report import ParityReport


def limits(report: ParityReport) -> tuple[str, ...]:
    """The limits of a report, one sentence or two each."""
    reached = max(report.figures.positions, default=0) + 1
    found = ["The figures are of these texts. Other texts may bring larger errors."]
    if reached < report.max_length:
        found.append(f"Of the cache's {report.max_length:,} slots the first {reached:,} were used.")
    if report.logits == "last":
        found.append(
            "The bundle gives the logits of a step's last token: within a step of several tokens only the "
            "keys and values were compared."
        )
    found += [
        f"Keys and values were compared at up to {CACHE_POSITIONS} positions of each text.",
        "One row ran at a time: what goes wrong only between the rows of a batch is not seen.",
        "The bundle ran with one runtime on one machine; others round in other ways.",
        "Both sides were given the same tokens: a wrong tokenizer is not seen, and neither is a checkpoint "
        "that is bad itself.",
    ]
    if report.reference.endswith("eager decoder"):
        found.append(
            "The reference is this project's own decoder, from which the bundle's graph was traced. Tests "
            "hold that against transformers; gemma-export parity --reference transformers does so here."
        )
    return tuple(found)
