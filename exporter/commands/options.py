"""Options of the command line that several commands have, with their help: `size: options.Size = None`."""

from pathlib import Path
from typing import Annotated

import typer

from gemma_export.exporter.config import SIZES
from gemma_export.exporter.engines.request import Flavour
from gemma_export.exporter.request import CacheKind, ParityLevel
from gemma_export.exporter.request import LocalCache as LocalCacheKind
from gemma_export.exporter.request import Observer as ObserverName
from gemma_export.runtime.manifest import LogitsKind

Size = Annotated[str | None, typer.Option(help=f"{', '.join(SIZES)}; by default the checkpoint's.")]
Checkpoint = Annotated[
    Path | None, typer.Option(help="Folder or file: safetensors (Hugging Face) or .ckpt (Google).")
]
RandomWeights = Annotated[bool, typer.Option("--random-weights", help="Try a size without its weights.")]
WeightsSeed = Annotated[int | None, typer.Option(help="Of the random weights.")]
Tokenizer = Annotated[Path | None, typer.Option(help="A tokenizer.model from elsewhere.")]
Precision = Annotated[str, typer.Option(help="fp32, fp16, bf16, int8 or int4.")]
Quantized = Annotated[str, typer.Option("--precision", help="int8 or int4.")]
Target = Annotated[str, typer.Option(help="cpu, cuda, onnx (standard operators), rtx or tensorrt (engines).")]
Compiled = Annotated[
    Flavour, typer.Option("--target", help="What compiles: TensorRT for RTX, or TensorRT on its device.")
]
Scheme = Annotated[
    str | None, typer.Option(help="How int8 and int4 compute: w8a8-dynamic, w8a8, w8a16, w4a16.")
]
Block = Annotated[int | None, typer.Option(help="Columns of a weight that share a scale.")]
CalibrationData = Annotated[
    Path | None,
    typer.Option(help="Text or JSON lines to calibrate on; by default what the model writes itself."),
]
CalibrationSamples = Annotated[int | None, typer.Option(help="How many pieces of it.")]
CalibrationLength = Annotated[int | None, typer.Option(help="Tokens of each.")]
CalibrationSeed = Annotated[int | None, typer.Option(help="Of what is chosen, or written.")]
Observer = Annotated[ObserverName, typer.Option(help="What sets the scale that activations share.")]
Scales = Annotated[Path | None, typer.Option(help="A file that `calibrate` wrote.")]
NoCalibration = Annotated[
    bool, typer.Option("--no-calibration", help="Scales from the weights alone; read no text.")
]
Cache = Annotated[CacheKind, typer.Option(help="As the precision has it, or 8 bits.")]
LocalCache = Annotated[
    LocalCacheKind, typer.Option(help="Local layers keep every position, or their window only.")
]
MaxKl = Annotated[
    float | None, typer.Option(help="Keep layers in 16 bits, so that the mean KL is at most this.")
]
MaxPerplexityIncrease = Annotated[float | None, typer.Option(help="Likewise for the perplexity, in percent.")]
MaxLength = Annotated[
    int | None, typer.Option(help="Tokens of prompt and answer together; by default the model's context.")
]
Logits = Annotated[LogitsKind, typer.Option(help="Of the last token, or of all (for perplexity).")]
Parity = Annotated[ParityLevel, typer.Option(help="How much to measure against the checkpoint.")]
AllowParityFailure = Annotated[
    bool, typer.Option("--allow-parity-failure", help="Keep a bundle that is outside its budget.")
]
OutputBundle = Annotated[Path | None, typer.Option("-o", "--output", help="Folder of the bundle.")]
Sm = Annotated[
    list[str] | None,
    typer.Option("--sm", help="Compute capabilities of the GPUs, as in 89 or 86,89; may be repeated."),
]
MaxBatch = Annotated[int | None, typer.Option(help="The most rows that decode together.")]
PrefillChunk = Annotated[int | None, typer.Option(help="The most tokens of a prompt that are run at once.")]
DeviceName = Annotated[
    str | None, typer.Option("--device", help="Where it must fit, as in orin-nano-8gb or rtx-4060.")
]
Memory = Annotated[str | None, typer.Option(help="Or how much memory the model may use, as in 8GiB.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an older bundle.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing; with --json, the result.")]
Bundle = Annotated[Path, typer.Argument(metavar="BUNDLE", help="The folder that `build` wrote.")]
Json = Annotated[bool, typer.Option("--json", help="Write JSON for programs.")]
Temperature = Annotated[float, typer.Option(help="0 always takes the likeliest token.")]
TopK = Annotated[int, typer.Option(help="Draw from the K likeliest tokens; 0 from all.")]
TopP = Annotated[float, typer.Option(help="Draw from the likeliest tokens that make up P.")]
Penalty = Annotated[float, typer.Option(help="Above 1, tokens that were used become less likely.")]
Seed = Annotated[int | None, typer.Option(help="Makes drawing repeatable.")]
DraftTokens = Annotated[
    int, typer.Option(help="Look up to N next tokens up in the text so far, and verify them in one step.")
]
SaveCache = Annotated[Path | None, typer.Option(help="Keep what was read in a file, for --load-cache.")]
LoadCache = Annotated[Path | None, typer.Option(help="Read only what differs from what --save-cache kept.")]
Stop = Annotated[list[str] | None, typer.Option("--stop", help="A text to stop at; may be repeated.")]
Text = Annotated[Path | None, typer.Option(help="Text to measure on; by default the project's own.")]
Threads = Annotated[int | None, typer.Option(help="Threads; by default one per core.")]
