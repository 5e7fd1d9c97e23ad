"""Trains a tiny model and writes it into the package: ``python -m recipes.tiny --size tiny2 --data DIR``."""

import argparse
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from statistics import fmean

import sentencepiece as spm
import torch
import transformers
from transformers import PreTrainedModel

from recipes.tiny.corpus import FILES, Text, read_texts
from recipes.tiny.measure import measure
from recipes.tiny.package import read_model, write, write_json, write_model
from recipes.tiny.tokenizer import BOS, END_OF_TURN, EOS, train_tokenizer
from recipes.tiny.train import SHAPES, Settings, train

PROMPTS = (
    "KING RICHARD III:\n",
    "I beheld the wretch",
    "<start_of_turn>user\nHow fares my noble lord?<end_of_turn>\n<start_of_turn>model\n",
)
TEMPERATURE, TOP_K = 0.8, 40
PACKAGE = Path("exporter")


def main() -> int:
    """Runs the recipe; the figures it prints are of the rounded weights that it wrote."""
    options = arguments()
    folder = options.out or PACKAGE / options.size
    torch.set_num_threads(options.threads)
    try:
        texts = read_texts(options.data)
    except (FileNotFoundError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    content = train_tokenizer(text.train for text in texts)
    write(folder, "tokenizer.model", content)
    pieces = spm.SentencePieceProcessor(model_proto=content)

    settings = Settings(size=options.size, steps=options.steps, seed=options.seed)
    begun = time.perf_counter()
    trained, seen = train(pieces, texts, settings, progress(settings, pieces, texts))
    seconds = time.perf_counter() - begun

    write_model(folder, trained)
    model = read_model(folder)
    parts = {"both": texts, **{text.name: [text] for text in texts}}
    measures = {name: measure(model, pieces, part, settings.length) for name, part in parts.items()}
    write_json(
        folder,
        "training.json",
        {
            "parameters": sum(weight.numel() for weight in model.parameters()),
            "held_out": {name: asdict(measured) for name, measured in measures.items()},
            "tokens_seen": seen,
            "seconds": round(seconds, 1),
            "steps_per_second": round(settings.steps / seconds, 3),
            "threads": options.threads,
            "settings": asdict(settings),
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "sentencepiece": spm.__version__,
            },
        },
    )
    print(f"\n{'held out':14}{'tokens':>8}{'perplexity':>12}{'bits/byte':>11}{'unigram perplexity':>20}")
    for name, part in measures.items():
        figures = f"{part.perplexity:12.2f}{part.bits_per_byte:11.3f}{part.unigram_perplexity:20.1f}"
        print(f"{name:14}{part.tokens:8d}{figures}")
    torch.manual_seed(settings.seed)
    for prompt in PROMPTS:
        for style, temperature in (("greedy", 0.0), (f"temperature {TEMPERATURE}", TEMPERATURE)):
            print(f"\n--- {style} ---\n{prompt}{continuation(model, pieces, prompt, temperature)}")
    return 0


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m recipes.tiny", description=__doc__)
    files = " and ".join(FILES.values())
    parser.add_argument("--data", type=Path, required=True, help=f"folder with {files}")
    parser.add_argument("--size", choices=SHAPES, default="tiny", help="what to train (%(default)s)")
    parser.add_argument("--out", type=Path, help=f"folder to write ({PACKAGE}/SIZE)")
    parser.add_argument("--seed", type=int, default=1, help="seed of the weights and rows (%(default)s)")
    parser.add_argument("--steps", type=int, default=1000, help="optimiser steps (%(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="processor threads (%(default)s)")
    return parser.parse_args()


def progress(
    settings: Settings, pieces: spm.SentencePieceProcessor, texts: list[Text]
) -> Callable[[int, float, PreTrainedModel], None]:
    """A reporter that prints the training loss often and the held-out perplexity now and then.

    The held-out figure is for the reader only: no checkpoint is chosen by it.
    """
    begun = time.perf_counter()
    losses: list[float] = []

    def report(step: int, loss: float, averaged: PreTrainedModel) -> None:
        losses.append(loss)
        if step % 50 == 0 or step == settings.steps:
            pace = step / (time.perf_counter() - begun)
            line = f"step {step}/{settings.steps}  loss {fmean(losses[-50:]):.3f}  {pace:.2f} steps/s"
            if step % 250 == 0:
                held_out = measure(averaged, pieces, texts, settings.length)
                line += f"  held-out perplexity {held_out.perplexity:.1f}"
            print(line, flush=True)

    return report


@torch.inference_mode()
def continuation(
    model: PreTrainedModel,
    pieces: spm.SentencePieceProcessor,
    prompt: str,
    temperature: float,
    most: int = 120,
) -> str:
    """Continues a prompt until <eos>, <end_of_turn> or ``most`` tokens.

    Args:
        model: The model, in evaluation mode.
        pieces: The tokenizer.
        prompt: Text without <bos>.
        temperature: Zero takes the likeliest token; otherwise samples among the ``TOP_K`` likeliest.
        most: Most tokens to add.
    """
    ids = [BOS, *pieces.encode(prompt)]
    given = len(ids)
    while len(ids) < given + most and ids[-1] not in (EOS, END_OF_TURN):
        logits = model(input_ids=torch.tensor([ids])).logits[0, -1]
        if temperature > 0:
            values, tokens = logits.topk(TOP_K)
            ids.append(int(tokens[torch.multinomial((values / temperature).softmax(0), 1)]))
        else:
            ids.append(int(logits.argmax()))
    text: str = pieces.decode(ids[given:])
    return text


if __name__ == "__main__":
    sys.exit(main())
