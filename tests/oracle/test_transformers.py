"""Bundles against `transformers`, from checkpoints on the disk through the whole pipeline."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import google_state_dict
from support.oracle import (
    FAMILIES,
    RELATIVE_ERROR,
    SLOTS,
    assert_greedy,
    load_oracle,
    oracle_greedy,
    oracle_logits,
    random_gemma,
    random_tokens,
    relative_error,
    save_checkpoint,
)

from gemma_export.errors import ContextFullError
from gemma_export.exporter import events
from gemma_export.exporter.config import tiny_folder
from gemma_export.exporter.parity.measure import measure_bundle
from gemma_export.exporter.pipeline import BuildResult
from gemma_export.runtime.session import Session, load

Oracle = Callable[[str], Any]
Open = Callable[..., Session]
BuildOnce = Callable[..., BuildResult]

pytestmark = pytest.mark.slow

CHUNK = 16
each_family = pytest.mark.parametrize("family", FAMILIES)
heads = pytest.mark.parametrize("family", ["mqa", "mha"])


@pytest.fixture(scope="module")
def tiny_oracle() -> Any:
    return load_oracle(tiny_folder())


@pytest.fixture(scope="module")
def tiny_session(tiny_bundle: Path) -> Session:
    return load(tiny_bundle, threads=1)


# Logits


@each_family
def test_logits_of_every_position(family: str, open_family: Open, oracle_of: Oracle) -> None:
    tokens = random_tokens(SLOTS)
    expected = oracle_logits(oracle_of(family), tokens)
    error = relative_error(expected, open_family(family).logits(tokens))
    assert 0 < error < RELATIVE_ERROR, "exactly equal, they would not be two programs"


def test_logits_of_the_trained_model(tiny_bundle_all: Path, tiny_oracle: Any) -> None:
    session = load(tiny_bundle_all, threads=1)
    tokens = session.tokenizer.encode("It was on a dreary night of November that I beheld")[
        : session.max_length
    ]
    assert relative_error(oracle_logits(tiny_oracle, tokens), session.logits(tokens)) < RELATIVE_ERROR


def test_the_gate_passes_with_transformers_as_its_reference(tiny_bundle: Path) -> None:
    report = measure_bundle(
        tiny_bundle,
        checkpoint=tiny_folder(),
        reference="transformers",
        text=None,
        level="quick",
        listener=events.ignore,
    )
    assert (report.verdict, report.figures.top1_agreement) == ("pass", 1.0)
    assert "transformers" in report.reference


@heads
def test_logits_of_the_last_position_only(family: str, open_family: Open, oracle_of: Oracle) -> None:
    session, tokens = open_family(family, "last"), random_tokens(40)
    found = session.step([tokens], session.new_cache())
    assert found.shape == (1, 1, session.manifest.model.vocab_size)
    assert relative_error(oracle_logits(oracle_of(family), tokens)[-1], found[0, 0]) < RELATIVE_ERROR


@each_family
@pytest.mark.parametrize("sizes", [(1,) * 40, (7, 1, 16, 3, 1, 1, 11), (39, 1), (1, 39)], ids=str)
def test_steps_of_any_size_continue_the_cache(
    family: str, sizes: tuple[int, ...], open_family: Open, oracle_of: Oracle
) -> None:
    session, tokens = open_family(family), random_tokens(40, seed=3)
    cache, found, start = session.new_cache(), [], 0
    for size in sizes:
        found.append(session.step([tokens[start : start + size]], cache)[0])
        start += size
    expected = oracle_logits(oracle_of(family), tokens)
    assert relative_error(expected, np.concatenate(found)) < RELATIVE_ERROR


def test_keys_and_values_are_the_oracles(open_family: Open, oracle_of: Oracle) -> None:
    session, tokens = open_family("gqa"), random_tokens(40)
    cache = session.new_cache()
    session.step([tokens], cache)
    with torch.inference_mode():
        layers = oracle_of("gqa")(torch.tensor([tokens]), use_cache=True).past_key_values.layers
    for i, layer in enumerate(layers):
        assert relative_error(layer.keys.numpy(), cache.keys(i)) < RELATIVE_ERROR
        assert relative_error(layer.values.numpy(), cache.values(i)) < RELATIVE_ERROR


# Greedy text


@heads
def test_200_greedy_tokens(family: str, open_family: Open, oracle_of: Oracle) -> None:
    prompt = random_tokens(23, seed=65)
    tokens = open_family(family, "last").generate_tokens(prompt, max_new_tokens=200, stop_tokens=())
    assert tokens == oracle_greedy(oracle_of(family), prompt, 200)
    assert_greedy(oracle_of(family), prompt, tokens)
    assert len(set(tokens)) > 50, "text that repeats itself shows nothing"


def test_200_greedy_tokens_of_the_trained_model(tiny_session: Session, tiny_oracle: Any) -> None:
    prompt = tiny_session.tokenizer.encode("MENENIUS:\nWhat is the matter")
    tokens = tiny_session.generate_tokens(prompt, max_new_tokens=200, stop_tokens=())
    assert len(tokens) == 200
    assert_greedy(tiny_oracle, prompt, tokens)


@heads
@pytest.mark.parametrize("length", [1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 1])
def test_prompts_around_the_edge_of_a_chunk(
    family: str, length: int, open_family: Open, oracle_of: Oracle
) -> None:
    prompt = random_tokens(length, seed=length)
    tokens = open_family(family, "last").generate_tokens(
        prompt, max_new_tokens=12, stop_tokens=(), prefill_chunk=CHUNK
    )
    assert_greedy(oracle_of(family), prompt, tokens)


@heads
def test_a_generation_that_fills_the_cache(family: str, open_family: Open, oracle_of: Oracle) -> None:
    session, prompt = open_family(family, "last"), random_tokens(SLOTS - 9, seed=9)
    (completion,) = session.generate_tokens_batch([prompt], max_new_tokens=1000, stop_tokens=())
    assert completion.finish_reason == "context"
    # Nine for the slots that were left, and one that was chosen from the last slot's logits and needs none.
    assert len(completion.tokens) == 10
    assert_greedy(oracle_of(family), prompt, completion.tokens)


@heads
def test_a_prompt_as_long_as_the_cache(family: str, open_family: Open, oracle_of: Oracle) -> None:
    session, prompt = open_family(family, "last"), random_tokens(SLOTS, seed=11)
    (completion,) = session.generate_tokens_batch([prompt], stop_tokens=())
    assert (len(completion.tokens), completion.finish_reason) == (1, "context")
    assert_greedy(oracle_of(family), prompt, completion.tokens)
    with pytest.raises(ContextFullError):
        session.generate_tokens([*prompt, 5])


@heads
def test_rows_of_different_lengths_get_what_each_gets_alone(
    family: str, open_family: Open, oracle_of: Oracle
) -> None:
    session = open_family(family, "last")
    prompts = [random_tokens(length, seed=100 + length) for length in (1, 7, 16, 41)]
    together = session.generate_tokens_batch(prompts, max_new_tokens=24, stop_tokens=(), prefill_chunk=CHUNK)
    for prompt, row in zip(prompts, together, strict=True):
        assert list(row.tokens) == session.generate_tokens(prompt, max_new_tokens=24, stop_tokens=())
        assert_greedy(oracle_of(family), prompt, row.tokens)


@heads
def test_a_row_that_ends_early_leaves_the_others_alone(
    family: str, open_family: Open, oracle_of: Oracle
) -> None:
    session = open_family(family, "last")
    prompts = [random_tokens(length, seed=100 + length) for length in (7, 16, 41)]
    free = session.generate_tokens_batch(prompts, max_new_tokens=24, stop_tokens=())
    stop = free[1].tokens[3]
    stopped = session.generate_tokens_batch(prompts, max_new_tokens=24, stop_tokens=[stop])
    assert stopped[1].finish_reason == "stop"
    for one, all_of_it, prompt in zip(stopped, free, prompts, strict=True):
        assert one.tokens == all_of_it.tokens[: len(one.tokens)]
        assert one.finish_reason == "stop" or len(one.tokens) == 24
        assert_greedy(oracle_of(family), prompt, all_of_it.tokens)


# Every form of the same weights is the same bundle


def data_file(result: BuildResult) -> str:
    return result.manifest.files["model.onnx.data"].sha256


def test_every_form_of_a_checkpoint_gives_the_same_files(
    build_once: BuildOnce, checkpoint_of: Callable[[str], Path], tmp_path: Path
) -> None:
    source = checkpoint_of("mqa")
    options = {"logits": "last", "max_length": SLOTS}
    expected = build_once(checkpoint=source, **options)
    model = load_oracle(source)

    sharded = save_checkpoint(model, tmp_path / "sharded", torch.float32, max_shard_size="200KB")
    assert len(list(sharded.glob("model-*.safetensors"))) > 2
    google = tmp_path / "google"
    google.mkdir()
    state = {name: value for name, value in model.state_dict().items() if name != "lm_head.weight"}
    torch.save({"model_state_dict": google_state_dict(state)}, google / "gemma.ckpt")
    # Its head written out, as some fine-tunes have it.
    untied = tmp_path / "head"
    save_checkpoint(model, untied, torch.float32)
    tensors = load_file(untied / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, untied / "model.safetensors", metadata={"format": "pt"})
    for name in ("config.json", "tokenizer.model"):
        (google / name).write_bytes((source / name).read_bytes())

    forms = {"sharded safetensors": sharded, "google ckpt": google, "safetensors": untied}
    for form, folder in forms.items():
        found = build_once(checkpoint=folder, **options)
        assert found.manifest.checkpoint.form == form
        assert data_file(found) == data_file(expected), form
        assert found.manifest.files["model.onnx"] == expected.manifest.files["model.onnx"], form


def test_googles_form_needs_no_config_where_the_shapes_tell(build_once: BuildOnce, tmp_path: Path) -> None:
    folder = tmp_path / "google"
    folder.mkdir()
    state = load_file(tiny_folder() / "model.safetensors")
    torch.save({"model_state_dict": google_state_dict(state)}, folder / "gemma-tiny.ckpt")
    (folder / "tokenizer.model").write_bytes((tiny_folder() / "tokenizer.model").read_bytes())
    assert data_file(build_once(checkpoint=folder)) == data_file(build_once(size="tiny"))


# What other exporters got wrong


def test_the_embeddings_scale_is_not_rounded(open_family: Open, oracle_of: Oracle) -> None:
    # 72^½ is 8.485281…; as 8.49, or in bfloat16 as 8.5, it would be off by five in ten thousand and more.
    oracle, tokens = oracle_of("gqa"), random_tokens(64)
    ours = open_family("gqa").logits(tokens)
    exact = 72**0.5
    for rounded in (round(exact, 2), float(torch.tensor(exact).bfloat16())):
        embedding = oracle.model.embed_tokens
        handle = embedding.register_forward_hook(lambda module, args, out, r=rounded / exact: out * r)
        try:
            wrong = oracle_logits(oracle, tokens)
        finally:
            handle.remove()
        assert relative_error(wrong, ours) > 5 * RELATIVE_ERROR
    assert relative_error(oracle_logits(oracle, tokens), ours) < RELATIVE_ERROR


def test_the_activation_is_tanh_gelu_though_the_config_says_gelu(
    build_once: BuildOnce, tmp_path: Path
) -> None:
    # The first releases' config.json says hidden_act "gelu" and no more; the models were trained with tanh.
    family = FAMILIES["gqa"]
    model = random_gemma(family)
    folder = save_checkpoint(model, tmp_path / "gelu", family.dtype)
    config = folder / "config.json"
    config.write_text(
        config.read_text()
        .replace('"hidden_act": "gelu_pytorch_tanh"', '"hidden_act": "gelu"')
        .replace('"hidden_activation": "gelu_pytorch_tanh"', '"hidden_activation": null')
    )
    assert '"gelu"' in config.read_text()
    assert "tanh" not in config.read_text()
    session = load(build_once(checkpoint=folder, logits="all", max_length=SLOTS).path, threads=1)
    tokens = random_tokens(64)
    ours = session.logits(tokens)
    assert relative_error(oracle_logits(model, tokens), ours) < RELATIVE_ERROR
    for layer in model.model.layers:
        layer.mlp.act_fn = torch.nn.GELU()
    assert relative_error(oracle_logits(model, tokens), ours) > 5 * RELATIVE_ERROR


def test_heads_are_as_wide_as_the_config_says(open_family: Open) -> None:
    model = open_family("mha").manifest.model
    assert model.head_dim == 32 != model.hidden_size // model.num_query_heads


@each_family
def test_the_tied_embedding_is_stored_once(family: str, open_family: Open) -> None:
    session = open_family(family)
    manifest = session.manifest
    parameters = manifest.model.parameters
    tables = SLOTS * manifest.model.head_dim  # cos and sin of h / 2 columns each
    stored = 4 * (parameters.embedding + parameters.other + tables)
    size = manifest.files["model.onnx.data"].size
    # Between tensors is less than a page each; gains of less than 1 KiB are in the graph's file.
    assert abs(size - stored) < 4096 * 8 * manifest.model.num_layers + 2 * 4096 < 4 * parameters.embedding


def test_a_text_begins_with_bos(tiny_session: Session, tiny_bundle: Path, tiny_oracle: Any) -> None:
    import transformers

    text = "It was the best of times"
    tokens = tiny_session.tokenizer.encode(text)
    assert tokens[0] == 2
    assert 2 not in tokens[1:]
    theirs = transformers.AutoTokenizer.from_pretrained(tiny_bundle, local_files_only=True)
    assert theirs(text)["input_ids"] == tokens
    with_bos = tiny_session.generate(text, max_new_tokens=8)
    assert_greedy(tiny_oracle, tokens, with_bos.tokens)
    # And it makes a difference that a test can see.
    without = oracle_logits(tiny_oracle, tokens[1:])[-1]
    assert relative_error(oracle_logits(tiny_oracle, tokens)[-1], without) > 100 * RELATIVE_ERROR
