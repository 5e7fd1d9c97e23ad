import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import sentencepiece
from support.small_bundle import TOKENIZER, Shape, small_graph

from gemma_export.exporter.config import GemmaConfig, preset
from gemma_export.exporter.genai import genai_config, generation_config, write_genai_config
from gemma_export.exporter.tokenizer.files import TokenizerFacts, write_tokenizer

og = pytest.importorskip("onnxruntime_genai")

SHAPE = Shape(logits="last")
CONFIG = GemmaConfig(
    name="small",
    vocab_size=SHAPE.vocabulary,
    hidden_size=SHAPE.hidden,
    num_layers=SHAPE.layers,
    num_query_heads=SHAPE.heads,
    num_kv_heads=SHAPE.kv_heads,
    head_dim=SHAPE.head_dim,
    intermediate_size=SHAPE.feed_forward,
    context_length=8192,
)
FACTS = TokenizerFacts(2048, bos=2, eos=1, pad=0, stop_ids=(1, 107), start_of_turn=106, end_of_turn=107)
PROMPT = [2, 5, 77, 900, 1300, 12]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a bundle holds for onnxruntime-genai: the graph with external data, tokenizer, configurations."""
    folder = tmp_path_factory.mktemp("genai")
    onnx.save(
        small_graph(SHAPE),
        folder / "model.onnx",
        save_as_external_data=True,
        location="model.onnx.data",
        size_threshold=1024,
    )
    facts = write_tokenizer(TOKENIZER, folder, context_length=SHAPE.slots, vocab_size=SHAPE.vocabulary)
    write_genai_config(folder, CONFIG, facts, max_length=SHAPE.slots)
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return og.Model(str(folder))


@pytest.fixture(scope="module")
def tokenizer(model: Any) -> Any:
    return og.Tokenizer(model)


def generate(model: Any, *chunks: Sequence[int], max_length: int) -> list[int]:
    """Greedy, with the defaults of the bundle; the prompt may come in chunks."""
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=max_length)
    generator = og.Generator(model, parameters)
    for chunk in chunks:
        generator.append_tokens(chunk)
    while not generator.is_done():
        generator.generate_next_token()
    return [int(token) for token in generator.get_sequence(0)]


def generate_without_a_cache(folder: Path, prompt: Sequence[int], max_length: int) -> list[int]:
    """Greedy with plain onnxruntime: the whole sequence anew for each token."""
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    empty = np.zeros((1, SHAPE.kv_heads, SHAPE.slots, SHAPE.head_dim), np.float32)
    caches = {value.name: empty for value in session.get_inputs()[2:]}
    tokens = list(prompt)
    while len(tokens) < max_length and tokens[-1] not in FACTS.stop_ids:
        ids, positions = np.array([tokens]), np.arange(len(tokens))[None]
        (logits,) = session.run(["logits"], {"input_ids": ids, "position_ids": positions, **caches})
        tokens.append(int(np.argmax(logits[0, -1])))
    return tokens


def test_the_configuration_of_a_2b() -> None:
    config = GemmaConfig("gemma-2b", 256000, 2048, 18, 8, 1, 256, 16384, 8192)
    facts = TokenizerFacts(256000, 2, 1, 0, (1, 107), 106, 107)
    assert genai_config(config, facts, max_length=4096, graph_file="decoder.onnx") == {
        "model": {
            "type": "gemma",
            "vocab_size": 256000,
            "context_length": 4096,
            "bos_token_id": 2,
            "eos_token_id": [1, 107],
            "pad_token_id": 0,
            "decoder": {
                "filename": "decoder.onnx",
                "hidden_size": 2048,
                "head_size": 256,
                "num_attention_heads": 8,
                "num_key_value_heads": 1,
                "num_hidden_layers": 18,
                "session_options": {"log_severity_level": 3, "provider_options": []},
                "inputs": {
                    "input_ids": "input_ids",
                    "position_ids": "position_ids",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {"do_sample": False, "max_length": 4096, "past_present_share_buffer": True},
    }


def test_a_second_generation_says_so() -> None:
    facts = TokenizerFacts(256000, 2, 1, 0, (1, 107), 106, 107)
    written = genai_config(preset("gemma2-9b"), facts, max_length=8192)["model"]
    assert (written["type"], written["decoder"]["num_key_value_heads"]) == ("gemma2", 8)


def test_the_generation_configuration(folder: Path) -> None:
    expected = {
        "bos_token_id": 2,
        "eos_token_id": [1, 107],
        "pad_token_id": 0,
        "do_sample": False,
        "max_length": 64,
    }
    assert generation_config(FACTS, max_length=64) == expected
    assert json.loads((folder / "generation_config.json").read_text()) == expected


def test_the_names_are_the_graphs(folder: Path) -> None:
    decoder = json.loads((folder / "genai_config.json").read_text())["model"]["decoder"]
    graph = onnx.load(folder / decoder["filename"], load_external_data=False).graph
    for promised, values in ((decoder["inputs"], graph.input), (decoder["outputs"], graph.output)):
        names = [
            name % layer if "%d" in name else name
            for name in promised.values()
            for layer in range(decoder["num_hidden_layers"] if "%d" in name else 1)
        ]
        assert sorted(names) == sorted(value.name for value in values)


def test_greedy_tokens_are_those_of_plain_onnxruntime(folder: Path, model: Any) -> None:
    expected = generate_without_a_cache(folder, PROMPT, 40)
    assert generate(model, PROMPT, max_length=40) == [t for t in expected if t not in FACTS.stop_ids]
    assert len(set(expected[len(PROMPT) :])) > 2


def test_a_prompt_in_chunks_says_the_same(model: Any) -> None:
    whole = generate(model, PROMPT, max_length=20)
    assert generate(model, PROMPT[:2], PROMPT[2:], max_length=20) == whole


def test_the_cache_can_be_filled_and_not_overfilled(model: Any) -> None:
    full = generate(model, [2, 9, 40], max_length=SHAPE.slots)
    assert len(full) == SHAPE.slots
    with pytest.raises(
        RuntimeError, match=r"max_length \(65\) cannot be greater than .* context_length \(64\)"
    ):
        generate(model, PROMPT, max_length=SHAPE.slots + 1)


@pytest.mark.parametrize(
    "text",
    [
        "The quick brown fox",
        "  two spaces, then   three and     five",
        "\n\n\tdef f(x):\n        return 1234567\n",
        "naïve café 😀 你好 cafe\u0301",
        "<start_of_turn>user\nWho?<end_of_turn>\n<start_of_turn>model\n",
        "don't <h1>SHOUT</h1> <unused5> <0x0A> ▁",
        "\n" * 30,
    ],
    ids=ascii,
)
def test_texts_are_cut_as_sentencepiece_cuts_them(tokenizer: Any, text: str) -> None:
    original = sentencepiece.SentencePieceProcessor(model_file=str(TOKENIZER))
    assert list(tokenizer.encode(text)) == original.encode(text)


def test_control_tokens_are_known_and_left_out_of_text(tokenizer: Any) -> None:
    assert (tokenizer.bos_token_id, tokenizer.pad_token_id) == (2, 0)
    assert list(tokenizer.eos_token_ids) == [1, 107]
    ids = tokenizer.encode("<bos><start_of_turn>the  end<end_of_turn>\n")
    assert ids[0] == FACTS.bos
    assert tokenizer.decode(ids) == "the  end\n"


def test_the_chat_template_begins_with_bos(tokenizer: Any) -> None:
    messages = json.dumps([{"role": "user", "content": "Who?"}])
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    assert text == "<bos><start_of_turn>user\nWho?<end_of_turn>\n<start_of_turn>model\n"
    assert tokenizer.encode(text)[0] == FACTS.bos


def test_bos_begins_a_text_when_asked_for(model: Any) -> None:
    tokenizer = og.Tokenizer(model)
    tokenizer.update_options(add_special_tokens=True)
    assert tokenizer.encode("the")[0] == FACTS.bos
