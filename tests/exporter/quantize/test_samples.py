"""What the model writes itself: drawn from its own probabilities, repeatable, and never a control token."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gemma_export.calibration.windows import token_digest
from gemma_export.errors import CheckpointError, PromptError, UsageError
from gemma_export.exporter import events
from gemma_export.exporter.checkpoints.checkpoint import LazyTensor, RandomCheckpoint
from gemma_export.exporter.config import GemmaConfig
from gemma_export.exporter.parity.reference import Reference
from gemma_export.exporter.quantize import samples as samples_module
from gemma_export.exporter.quantize.calibration_text import calibration_sequences
from gemma_export.exporter.quantize.samples import SHORTEST, barred_tokens, beginnings, write_samples
from gemma_export.exporter.request import BuildRequest, CalibrationRequest
from gemma_export.exporter.source import Source, open_source, requested_source
from gemma_export.graphs.tensors import InMemory
from gemma_export.runtime.tokenizer import Tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = GemmaConfig("random", 40, 32, 2, 4, 2, 8, 48, 64)
BARRED = (0, 2, 3, 17)
BEGINNINGS = [[2], [2, 9, 8, 30, 4], [2], [2, 6], [2], [2, 5, 5, 5]]
LENGTH = 24


@pytest.fixture(params=[1, 2, 4], ids=["MQA", "GQA", "MHA"], scope="module")
def model(request: pytest.FixtureRequest) -> tuple[GemmaConfig, dict[str, LazyTensor]]:
    return small(replace(CONFIG, num_kv_heads=request.param))


def small(config: GemmaConfig = CONFIG) -> tuple[GemmaConfig, dict[str, LazyTensor]]:
    checkpoint = RandomCheckpoint(config, seed=5)
    return config, {name.removeprefix("model."): tensor for name, tensor in checkpoint.items()}


def write(model: tuple[GemmaConfig, Any], **options: Any) -> list[list[int]]:
    options = {"beginnings": BEGINNINGS, "length": LENGTH, "seed": 0, "barred": BARRED} | options
    return write_samples(*model, options.pop("beginnings"), **options)


def probabilities(model: tuple[GemmaConfig, Any], sample: Sequence[int]) -> np.ndarray:
    """What the reference gives to each next token of a sample, of those that may be drawn: [T - 1, V]."""
    config, weights = model
    logits = Reference(config, weights).run([sample]).logits(0)[:-1].astype(np.float64)
    logits[:, BARRED] = -np.inf
    logits[: SHORTEST - 1, config.eos_token_id] = -np.inf
    weights_of = np.exp(logits - logits.max(-1, keepdims=True))
    return np.asarray(weights_of / weights_of.sum(-1, keepdims=True))


def begins_with(sample: Sequence[int]) -> int:
    """How many tokens of a sample were given: of those that restart, BOS alone."""
    given = [b for b in BEGINNINGS if sample[: len(b)] == b]
    return max(len(b) for b in given)


# What is drawn


def surprise(model: tuple[GemmaConfig, Any], written: Sequence[Sequence[int]]) -> float:
    """How much likelier samples are than drawing makes them, in standard deviations.

    The log-probability of a token that is drawn is minus the entropy of what it is drawn from, on average.
    """
    excess = variance = 0.0
    for sample in written:
        given = begins_with(sample)
        p = probabilities(model, sample)[given - 1 :]
        logs = np.log(np.maximum(p, 1e-300))
        entropy = -(p * logs).sum(-1)
        excess += float((logs[np.arange(len(p)), sample[given:]] + entropy).sum())
        variance += float(((p * logs**2).sum(-1) - entropy**2).sum())
    return excess / variance**0.5


def test_each_token_is_drawn_with_the_references_probabilities(model) -> None:
    written = [sample for seed in range(4) for sample in write(model, seed=seed)]
    # Four standard deviations; the seeds are fixed.
    assert abs(surprise(model, written)) < 4
    # That is no empty bound: the same tokens in another order, and those the model likes too much, are far
    # outside.
    random = np.random.default_rng(0)
    shuffled = []
    for sample in written:
        given = begins_with(sample)
        shuffled.append([*sample[:given], *random.permutation(sample[given:]).tolist()])
    assert surprise(model, shuffled) < -8
    assert surprise(model, [s for seed in range(4) for s in write(model, seed=seed, temperature=0.5)]) > 8


@pytest.mark.parametrize("kept", [True, False], ids=["in memory", "layer by layer"])
def test_temperature_zero_takes_what_the_reference_likes_best(model, kept, monkeypatch) -> None:
    if not kept:
        monkeypatch.setattr(samples_module, "KEPT_BYTES", 0)
    for sample in write(model, temperature=0.0):
        given = begins_with(sample)
        best = probabilities(model, sample).argmax(-1)
        assert sample[given:] == best[given - 1 :].tolist()


def test_a_sample_does_not_depend_on_the_others(model) -> None:
    together = write(model, length=12)
    assert len(together) == len(BEGINNINGS)  # None ended early, so that each stands at its place.
    assert write(model, length=12, beginnings=BEGINNINGS[:1]) == together[:1]
    assert write(model, length=12, beginnings=BEGINNINGS[:4]) == together[:4]


def test_the_seed_decides(model) -> None:
    first = write(model, seed=1)
    assert write(model, seed=1) == first
    assert write(model, seed=2) != first
    rows = write(model, beginnings=[[2]] * 6, length=12)
    assert len({tuple(row) for row in rows}) == 6  # Rows that begin alike go on differently.


def test_a_large_model_is_read_layer_by_layer_and_says_the_same(model, monkeypatch) -> None:
    kept = write(model)
    reads = []

    def read(name: str, lazy: LazyTensor) -> Any:
        class Counting(InMemory):
            def read(self, start: int, stop: int) -> torch.Tensor:
                reads.append(name)
                return super().read(start, stop)

        return Counting(name, lazy.read(0, lazy.shape[0]))

    config, weights = model
    counting = {name: read(name, lazy) for name, lazy in weights.items()}
    monkeypatch.setattr(samples_module, "KEPT_BYTES", 0)
    assert write((config, counting)) == kept
    # One pass over the layers for each token of all samples together.
    assert reads.count("layers.1.mlp.down_proj.weight") == LENGTH - 1


# Where samples begin and end


def test_samples_are_as_long_as_asked_or_end_where_the_model_ends_them(model) -> None:
    lengths = [len(sample) for seed in range(6) for sample in write(model, seed=seed)]
    assert max(lengths) == LENGTH
    assert min(lengths) >= SHORTEST
    assert len(lengths) > 6 * len(BEGINNINGS)  # Some ended early, and others took their place.


def test_a_model_that_always_ends_still_writes(model) -> None:
    """All other tokens barred, each sample has what may be drawn before its end is allowed, no more."""
    others = [token for token in range(40) if token not in (1, 7)]
    config, weights = model
    table = weights["embed_tokens.weight"].read(0, 40).float()
    table[7] = table[1]  # The end of a text is as likely as the one token that is left.
    either = {**weights, "embed_tokens.weight": InMemory("embed_tokens.weight", table)}
    written = write((config, either), barred=others)
    assert len(written) >= len(BEGINNINGS)
    for sample in written:
        assert SHORTEST <= len(sample) <= LENGTH
        assert set(sample[begins_with(sample) :]) == {7}


def test_nothing_barred_is_drawn_and_no_second_bos(model) -> None:
    for sample in write(model):
        assert sample[0] == 2
        assert not {*BARRED, 1} & set(sample[1:])


def test_a_short_length_is_kept(model) -> None:
    written = write(model, length=4, beginnings=[[2]] * 3)
    assert [len(sample) for sample in written] == [4, 4, 4]


def test_progress_counts_tokens(model) -> None:
    told: list[tuple[int, int]] = []
    write(model, progress=lambda done, total: told.append((done, total)))
    assert told == [(6 * step, 6 * 23) for step in range(1, 24)]


def test_weights_that_are_no_numbers(model) -> None:
    config, weights = model
    broken = {**weights, "norm.weight": InMemory("norm.weight", torch.full((32,), torch.nan))}
    with pytest.raises(CheckpointError, match="its largest logit is nan"):
        write((config, broken))


# With a tokenizer


@pytest.fixture(scope="module")
def tiny() -> Source:
    return open_source(size="tiny")


@pytest.fixture(scope="module")
def tokenizer(tiny: Source) -> Tokenizer:
    assert tiny.tokenizer is not None
    return Tokenizer(tiny.tokenizer, 2048)


def test_what_no_text_has_is_barred(tiny: Source) -> None:
    assert tiny.tokenizer is not None
    barred = barred_tokens(tiny.tokenizer.read_bytes(), 2050, eos=1)
    # <pad> <bos> <unk> <mask> <unused0>… <start_of_turn> <end_of_turn>, and rows without a piece.
    assert barred == [0, *range(2, 108), 2048, 2049]


def test_beginnings_alternate_between_nothing_and_the_passages(tokenizer: Tokenizer) -> None:
    begun = beginnings(tokenizer, 26, 64)
    assert begun[::2] == [[2]] * 13
    assert [len(tokens) for tokens in begun[1::2]] == [9] * 13
    assert begun[1] == begun[25]  # There are twelve passages.
    assert len({tuple(tokens) for tokens in begun[1:25:2]}) == 12
    assert tokenizer.decode(begun[1]).startswith("The ferry left")
    assert max(len(tokens) for tokens in beginnings(tokenizer, 4, 6)) == 4


def sequences(
    source: Source, listener: events.Listener = events.ignore, **options: Any
) -> tuple[list[list[int]], Any]:
    request = BuildRequest(size="tiny", precision="int8", calibration=CalibrationRequest(**options))
    return calibration_sequences(source, request, listener)


def test_without_a_file_the_model_writes(tiny: Source, tokenizer: Tokenizer) -> None:
    told: list[events.Event] = []
    written, text = sequences(tiny, told.append, samples=8, length=32, seed=4)
    assert [len(sample) for sample in written] == [32] * 8
    assert (text.source, text.samples, text.tokens, text.seed) == ("written by the model", 8, 256, 4)
    assert text.digest == token_digest(written)
    assert [sample[:9] for sample in written[1::2]] == beginnings(tokenizer, 8, 32)[1::2]
    assert [type(event).__name__ for event in told] == [
        "StageStarted",
        *["StageProgress"] * 31,
        "StageFinished",
    ]
    assert sequences(tiny, samples=8, length=32, seed=4) == (written, text)
    # What a trained model writes is text: uniformly drawn tokens are far less likely to it.
    reference = Reference(tiny.config, tiny.weights)
    noise = np.random.default_rng(0).integers(108, 2048, (4, 32)).tolist()
    assert mean_loss(reference, written[:4]) < 6 < mean_loss(reference, noise)


def mean_loss(reference: Reference, written: Sequence[Sequence[int]]) -> float:
    run = reference.run(written, keep_cache=False)
    losses = []
    for i, sample in enumerate(written):
        logits = torch.from_numpy(run.logits(i)[:-1])
        losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor(list(sample[1:]))).item())
    return float(np.mean(losses))


def test_a_file_is_read(tiny: Source, tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("It was on a dreary night of November. " * 100)
    written, text = sequences(tiny, data=path, samples=4, length=64)
    assert [len(sample) for sample in written] == [64] * 4
    assert (text.source, text.samples, text.tokens, text.seed) == ("text.txt", 4, 256, 0)
    assert "night of November" in tokenizer.decode(written[0])


def test_a_file_that_says_too_little(tiny: Source, tmp_path: Path) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text('{"text": "Once upon a time"}')
    with pytest.raises(PromptError, match="a calibration needs at least 256"):
        sequences(tiny, data=path)


def test_longer_than_the_models_context(tiny: Source) -> None:
    with pytest.raises(UsageError, match="--calibration-length 513"):
        sequences(tiny, length=513)


def test_random_weights_do_not_write(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of their tokens would cost the making of all weights, and say nothing."""
    monkeypatch.delattr(samples_module.Reference, "load")
    request = BuildRequest(size="2b", random_weights=True, precision="int8")
    written, text = calibration_sequences(requested_source(request), request, events.ignore)
    assert text.source == "the project's own passages"
    assert text.tokens == sum(len(sample) for sample in written) > 1000
    assert {sample[0] for sample in written} == {2}
