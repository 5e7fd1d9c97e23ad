"""What a calibration is asked for: frozen, complete, and possible."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal, get_args

from gemma_export.calibration.text import FEWEST_TOKENS
from gemma_export.errors import UsageError
from gemma_export.exporter.config import GemmaConfig

Observer = Literal["absmax", "percentile", "entropy", "mse"]
OBSERVERS: tuple[Observer, ...] = get_args(Observer)


@dataclass(frozen=True)
class CalibrationRequest:
    """What a calibration runs on.

    Attributes:
        data: A file with text; None lets the model write its own.
        samples: The most sequences; None takes as many as do: 128 of a file, 32 of the model's own.
        length: The most tokens of each; None takes 512 of a file, 64 of the model's own.
        seed: Of what is chosen from the file, or of what the model writes; None takes 0.
        observer: What sets the scale of activations that share one.
    """

    data: Path | None = None
    samples: int | None = None
    length: int | None = None
    seed: int | None = None
    observer: Observer = "mse"

    def __post_init__(self) -> None:
        if self.samples is not None and self.samples < 1:
            raise UsageError(
                f"--calibration-samples {self.samples} leaves nothing to calibrate on.", "Give at least 1."
            )
        if self.length is not None and self.length < 2:
            raise UsageError(
                f"--calibration-length {self.length} leaves no text behind the first token.",
                "Give at least 2.",
            )
        if self.seed is not None and self.seed < 0:
            raise UsageError(f"--calibration-seed {self.seed} is negative.", "Give 0 or more.")
        if self.observer not in OBSERVERS:
            raise UsageError(
                f"--observer {self.observer} is not a choice.", f"Choose one of {', '.join(OBSERVERS)}."
            )
        most = self.most_samples * self.most_tokens
        if most < FEWEST_TOKENS:
            raise UsageError(
                f"{self.most_samples} samples of {self.most_tokens} tokens are {most} at most; a calibration "
                f"needs at least {FEWEST_TOKENS}.",
                f"Give --calibration-samples {-(-FEWEST_TOKENS // self.most_tokens)} or more, or a greater "
                "--calibration-length.",
            )

    @property
    def most_samples(self) -> int:
        """The most sequences."""
        return self.samples or (128 if self.data is not None else 32)

    @property
    def most_tokens(self) -> int:
        """The most tokens of a sequence, whatever the model."""
        return self.length or (512 if self.data is not None else 64)

    @property
    def given(self) -> tuple[str, ...]:
        """The options that were given, as they are typed."""
        return tuple(_OPTIONS[f.name] for f in fields(self) if getattr(self, f.name) != f.default)

    def tokens_for(self, config: GemmaConfig) -> int:
        """The most tokens of a sequence for a model.

        Raises:
            UsageError: More were asked for than the model was trained for.
        """
        if self.length is not None and self.length > config.context_length:
            raise UsageError(
                f"--calibration-length {self.length} is more than {config.name} was trained for "
                f"({config.context_length} tokens).",
                f"Give at most {config.context_length}.",
            )
        return min(self.most_tokens, config.context_length)


_OPTIONS = {
    "data": "--calibration-data",
    "samples": "--calibration-samples",
    "length": "--calibration-length",
    "seed": "--calibration-seed",
    "observer": "--observer",
}
