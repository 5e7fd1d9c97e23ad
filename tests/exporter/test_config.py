"""The sizes against the report, and `config.json` in both its dialects."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import LITTLE, LITTLE_2, config_json

from gemma_export.errors import CheckpointError, UsageError
from gemma_export.exporter.config import (
    SIZES,
    GemmaConfig,
    config_from_json,
    hub_repositories,
    preset,
    require_size,
    size_of,
    tiny_folder,
)


@pytest.mark.parametrize(
    ("size", "embedding", "other"),
    [
        ("2b", 524_550_144, 1_981_884_416),
        ("7b", 786_825_216, 7_751_248_896),
        ("gemma2-2b", 590_118_912, 2_024_517_888),
        ("gemma2-9b", 917_962_752, 8_324_201_984),
        ("gemma2-27b", 1_180_237_824, 26_047_480_320),
    ],
)
def test_sizes_have_the_parameters_of_the_report(size: str, embedding: int, other: int) -> None:
    # Table 2 of either report, which counts the padded table of 256128 rows.
    config = replace(preset(size), vocab_size=256_128)
    assert config.embedding_parameters == embedding
    assert config.other_parameters == other


def test_weight_shapes_are_the_design_s() -> None:
    shapes = preset("7b").weight_shapes
    assert len(shapes) == 1 + 28 * 9 + 1
    assert shapes["embed_tokens.weight"] == (256_000, 3072)
    assert shapes["layers.27.self_attn.q_proj.weight"] == (4096, 3072)  # 16 x 256: not hidden_size
    assert shapes["layers.0.self_attn.o_proj.weight"] == (3072, 4096)
    assert shapes["layers.0.mlp.down_proj.weight"] == (3072, 24_576)
    assert preset("2b").weight_shapes["layers.0.self_attn.k_proj.weight"] == (256, 2048)
    shapes = preset("gemma2-27b").weight_shapes
    assert len(shapes) == 1 + 46 * 11 + 1
    assert shapes["layers.45.self_attn.o_proj.weight"] == (4608, 4096)  # 32 x 128
    assert shapes["layers.45.pre_feedforward_layernorm.weight"] == (4608,)


@pytest.mark.parametrize("size", ["gemma2-2b", "gemma2-9b", "gemma2-27b"])
def test_the_second_generation_begins_with_a_local_layer(size: str) -> None:
    config = preset(size)
    assert config.windows[:4] == (4096, None, 4096, None)
    assert len(config.windows) == config.num_layers
    assert (config.attention_softcap, config.final_softcap) == (50.0, 30.0)
    assert config.mlp_norm == "pre_feedforward_layernorm"
    assert config.attention_scale == {"gemma2-27b": 1 / 12}.get(size, 1 / 16)


@pytest.mark.parametrize("size", ["2b", "7b"])
def test_the_first_generation_has_nothing_of_it(size: str) -> None:
    config = preset(size)
    assert set(config.windows) == {None}
    assert config.attention_scale == 1 / 16
    assert (config.attention_softcap, config.final_softcap, config.post_norms) == (None, None, False)
    assert config.mlp_norm == "post_attention_layernorm"


@pytest.mark.parametrize("size", SIZES)
def test_every_size_is_its_own(size: str) -> None:
    config = preset(size)
    assert config.name == f"gemma-{size.replace('gemma2', '2')}"
    assert size_of(config) == size
    assert size_of(replace(config, vocab_size=config.vocab_size + 128, name="other")) == size
    require_size(config, size)


def test_tiny_is_read_from_what_ships() -> None:
    values = json.loads((tiny_folder() / "config.json").read_text())
    assert preset("tiny").head_dim == values["head_dim"]


def test_unknown_size_names_those_there_are() -> None:
    with pytest.raises(UsageError, match="'3b'") as caught:
        preset("3b")
    assert "2b" in caught.value.hint


def test_another_size_than_asked_for_is_said() -> None:
    with pytest.raises(CheckpointError, match=r"--size 2b.*7b.*hidden_size 3072 instead of 2048") as caught:
        require_size(preset("7b"), "2b")
    assert "7b" in caught.value.hint
    with pytest.raises(CheckpointError, match="no known size"):
        require_size(LITTLE, "2b")
    assert size_of(LITTLE) is None
    with pytest.raises(CheckpointError, match=r"a gemma2-2b: it has family gemma2 instead of gemma\."):
        require_size(preset("gemma2-2b"), "2b")


@pytest.mark.parametrize(
    ("field", "value"),
    [("sliding_window", 2048), ("final_softcap", None), ("query_pre_attn_scalar", 288)],
)
def test_a_size_is_more_than_its_widths(field: str, value: object) -> None:
    config = GemmaConfig(**{**vars(preset("gemma2-2b")), field: value})
    assert size_of(config) is None
    with pytest.raises(CheckpointError, match=r"softcap|window|scale"):
        require_size(config, "gemma2-2b")


def test_repositories_begin_with_the_base_model() -> None:
    assert hub_repositories("2b")[0] == "google/gemma-2b"
    assert hub_repositories("7b")[0] == "google/gemma-7b"
    assert hub_repositories("gemma2-9b")[0] == "google/gemma-2-9b"
    assert hub_repositories("tiny") == ()


@pytest.mark.parametrize("transformers", [4, 5])
@pytest.mark.parametrize("little", [LITTLE, LITTLE_2], ids=["gemma", "gemma2"])
def test_both_dialects_say_the_same(little: GemmaConfig, transformers: int, tmp_path: Path) -> None:
    config = replace(little, rope_theta=5000.0)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config_json(config, transformers)))
    assert config_from_json(path) == config_from_json(str(path)) == config


@pytest.mark.parametrize("size", [size for size in SIZES if size != "tiny"])
def test_released_configurations_are_the_presets(size: str) -> None:
    assert config_from_json(config_json(preset(size), 4)) == preset(size)
    assert config_from_json(config_json(preset(size), 4), name="mine").name == "mine"


@pytest.mark.parametrize("key", ["hidden_act", "hidden_activation"])
@pytest.mark.parametrize("activation", ["gelu", "gelu_pytorch_tanh"])
def test_gelu_is_accepted_in_all_its_spellings(key: str, activation: str) -> None:
    changes: dict[str, Any] = {key: activation}
    assert config_from_json(config_json(**changes)) == LITTLE


def test_what_is_left_out_has_the_family_s_value() -> None:
    left_out: dict[str, Any] = dict.fromkeys(
        ("rope_parameters", "rms_norm_eps", "bos_token_id", "pad_token_id")
    )
    assert config_from_json(config_json(**left_out)) == LITTLE


def test_the_first_of_several_ends_is_taken() -> None:
    assert config_from_json(config_json(eos_token_id=[1, 7])).eos_token_id == 1


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "gemma2"}, "'gemma2'"),
        ({"model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"]}, "sliding_window"),
        ({"architectures": ["Gemma2ForCausalLM"]}, "'gemma'"),
        ({"model_type": "gemma3_text", "architectures": None}, "'gemma3_text'"),
        ({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}, "'llama'"),
        ({"architectures": ["GemmaForSequenceClassification"]}, "'GemmaForSequenceClassification'"),
        ({"model_type": None, "architectures": ["Gemma3ForCausalLM"]}, "'Gemma3ForCausalLM'"),
        ({"model_type": None, "architectures": "MistralForCausalLM"}, "'MistralForCausalLM'"),
        ({"model_type": None, "architectures": None}, "model_type"),
        ({"model_type": ["gemma"]}, "gemma"),
        ({"hidden_act": "relu"}, 'hidden_act = "relu"'),
        ({"hidden_activation": "silu"}, "silu"),
        ({"attention_bias": True}, "attention_bias"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ({"quantization_config": {"quant_method": "awq"}}, "awq"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "linear"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}, "yarn"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "factor": 4.0}}, "factor"),
        ({"rope_parameters": {"sliding_attention": {"rope_type": "default"}}}, "sliding_attention"),
        ({"rope_parameters": "dynamic"}, "dynamic"),
        ({"head_dim": None}, "head_dim"),
        ({"num_hidden_layers": "18"}, "num_layers"),
        ({"num_hidden_layers": True}, "num_layers"),
        ({"rope_theta": -1.0, "rope_parameters": None}, "rope_theta"),
        ({"eos_token_id": []}, "eos_token_id"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_is_no_gemma_is_refused_by_name(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        config_from_json(config_json(**changes))
    assert said in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"architectures": ["GemmaForCausalLM"]}, "gemma2"),
        ({"hidden_activation": "gelu"}, 'no Gemma 2 has ("gelu_pytorch_tanh")'),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ({"sliding_window": None}, "does not give sliding_window"),
        ({"query_pre_attn_scalar": None}, "does not give query_pre_attn_scalar"),
        ({"attn_logit_softcapping": None}, "does not give attn_logit_softcapping"),
        ({"attn_logit_softcapping": 0.0}, "attention_softcap"),
        ({"final_logit_softcapping": -30.0}, "final_softcap"),
        ({"layer_types": ["chunked_attention"] * 3}, '"chunked_attention"'),
        ({"layer_types": "sliding_attention"}, '"sliding_attention"'),
        ({"layer_types": ["full_attention"] * 2}, "layer_kinds"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 8.0}}, "Gemma 2 has only"),
        ({"num_hidden_layers": "3", "layer_types": None}, "num_layers"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_is_no_gemma_2_is_refused_by_name(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        config_from_json(config_json(LITTLE_2, **changes))
    assert said in caught.value.message
    assert caught.value.hint


def test_a_soft_cap_of_null_is_none() -> None:
    values = config_json(LITTLE_2) | {"attn_logit_softcapping": None}
    assert config_from_json(values) == replace(LITTLE_2, attention_softcap=None)


def test_the_order_of_layers_is_the_file_s() -> None:
    # A fine-tune may have it otherwise; where nothing is said, the first is local.
    types = ["full_attention", "full_attention", "sliding_attention"]
    assert config_from_json(config_json(LITTLE_2, layer_types=types)).windows == (None, None, 8)
    assert config_from_json(config_json(LITTLE_2, layer_types=None)).windows == (8, None, 8)


def test_a_local_layer_has_a_window() -> None:
    with pytest.raises(CheckpointError, match="sliding_window"):
        replace(LITTLE_2, sliding_window=None)
    everywhere = replace(LITTLE_2, layer_kinds=("global",) * 3)
    assert everywhere.windows == (None, None, None)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("layer_kinds", ("local",)),
        ("layer_kinds", ("global", "sideways", "global")),
        ("sliding_window", 0),
        ("sliding_window", 8.0),
        ("query_pre_attn_scalar", 0),
        ("vocab_size", 0),
        ("num_layers", -1),
        ("hidden_size", 24.0),
        ("num_kv_heads", 3),
        ("num_kv_heads", 8),
        ("head_dim", 7),
        ("rms_norm_eps", 0.0),
        ("rms_norm_eps", float("nan")),
        ("rope_theta", float("inf")),
        ("bos_token_id", 96),
        ("pad_token_id", -1),
    ],
)
def test_impossible_numbers_are_refused(field: str, value: object) -> None:
    with pytest.raises(CheckpointError, match=field) as caught:
        GemmaConfig(**{**vars(LITTLE), field: value})
    assert caught.value.hint


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'"gemma"', b"\xff\xfe\xff", b"[" * 100_000])
def test_a_damaged_file_is_named(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        config_from_json(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read"):
        config_from_json(tmp_path / "config.json")
