"""The tokens that a calibration runs: of a file, or in the model's own words."""

from pathlib import Path
from tempfile import TemporaryDirectory

from gemma_export.calibration.scales import CalibrationText
from gemma_export.calibration.text import builtin_texts, read_documents
from gemma_export.calibration.windows import cut_windows, token_digest
from gemma_export.exporter import events
from gemma_export.exporter.quantize.samples import barred_tokens, beginnings, write_samples
from gemma_export.exporter.request import BuildRequest
from gemma_export.exporter.source import Source
from gemma_export.runtime.tokenizer import Tokenizer

STAGE = "text"
OWN_WORDS = "written by the model"
PASSAGES = "the project's own passages"


def calibration_sequences(
    source: Source, request: BuildRequest, listener: events.Listener = events.ignore
) -> tuple[list[list[int]], CalibrationText]:
    """Sequences of tokens to calibrate on, each beginning with BOS, and what to call them.

    Random weights have no words of their own; the project's passages do for them.

    Args:
        source: The model.
        request: Says which file, how many sequences, and how long.
        listener: Told of progress.

    Raises:
        PromptError: The file cannot be used.
        UsageError: The sequences are longer than the model's context.
        CheckpointError: The model cannot write.
    """
    options = request.calibration
    samples, length, seed = options.most_samples, options.tokens_for(source.config), options.seed or 0
    with events.stage(listener, STAGE) as facts, TemporaryDirectory() as folder:
        model = source.write_tokenizer_model(Path(folder))
        tokenizer = Tokenizer(model, source.config.vocab_size)
        if options.data is not None or request.random_weights:
            documents = builtin_texts() if options.data is None else read_documents(options.data)
            name = PASSAGES if options.data is None else options.data.name
            sequences = cut_windows(documents, tokenizer, samples=samples, length=length, seed=seed)
        else:
            name = OWN_WORDS
            sequences = write_samples(
                source.config,
                source.weights,
                beginnings(tokenizer, samples, length),
                length=length,
                seed=seed,
                barred=barred_tokens(
                    model.read_bytes(), source.config.vocab_size, source.config.eos_token_id
                ),
                progress=lambda done, total: listener(events.StageProgress(STAGE, done, total, "tokens")),
            )
        text = CalibrationText(
            source=name,
            samples=len(sequences),
            tokens=sum(len(sequence) for sequence in sequences),
            seed=seed,
            digest=token_digest(sequences),
        )
        facts |= {"source": name, "samples": text.samples, "tokens": text.tokens}
    return sequences, text
