"""The layer-by-layer reference against transformers' Gemma, and what it promises about memory."""

import gc
import sys
import weakref

import numpy as np
import pytest
import torch

from gemma_export.errors import CheckpointError, MissingDependencyError
from gemma_export.exporter.checkpoints.checkpoint import RandomCheckpoint
from gemma_export.exporter.config import GemmaConfig
from gemma_export.exporter.decoder import Decoder, rotary_tables
from gemma_export.exporter.parity import reference as reference_module
from gemma_export.exporter.parity.reference import Reference, head_logits
from gemma_export.exporter.parity.reference_transformers import TransformersReference

pytestmark = pytest.mark.usefixtures("one_thread")


SEQUENCES = [[2, 5, 9, 200, 31, 7, 7, 90], [2], [2, 299, 17, 4, 4, 120, 56, 33, 8, 211, 3, 150, 77]]
# fp32 rounds at 6e-8; logits are sums of some hundred products, and two orders of summation were seen to
# differ by 1e-6 of the largest logit.
TOLERANCE = 1e-5


def config(kv_heads: int, **changes: object) -> GemmaConfig:
    numbers = {
        "name": "random",
        "vocab_size": 300,
        "hidden_size": 48,
        "num_layers": 3,
        "num_query_heads": 4,
        "num_kv_heads": kv_heads,
        "head_dim": 16,
        "intermediate_size": 80,
        "context_length": 64,
    }
    return GemmaConfig(**(numbers | changes))  # type: ignore[arg-type]


def canonical(checkpoint: RandomCheckpoint) -> dict[str, object]:
    return {name.removeprefix("model."): tensor for name, tensor in checkpoint.items()}


def transformers_model(config: GemmaConfig, checkpoint: RandomCheckpoint) -> object:
    transformers = pytest.importorskip("transformers")
    model = transformers.GemmaForCausalLM(
        transformers.GemmaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_query_heads,
            num_key_value_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            max_position_embeddings=config.context_length,
            hidden_activation="gelu_pytorch_tanh",
            attn_implementation="eager",
            tie_word_embeddings=True,
        )
    )
    state = {name: tensor.read(0, tensor.shape[0]).float() for name, tensor in checkpoint.items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert set(missing) <= {"lm_head.weight"}
    assert not unexpected
    return model.float().eval()


def relative_error(actual: np.ndarray, expected: np.ndarray) -> float:
    assert actual.shape == expected.shape
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


@pytest.fixture(params=[1, 2, 4], ids=["MQA", "GQA", "MHA"])
def small(request: pytest.FixtureRequest) -> tuple[GemmaConfig, RandomCheckpoint, Reference]:
    shape = config(request.param)
    checkpoint = RandomCheckpoint(shape, seed=3)
    return shape, checkpoint, Reference(shape, canonical(checkpoint))


def test_logits_keys_and_values_are_those_of_transformers(small, tmp_path):
    _, checkpoint, reference = small
    transformers_model(small[0], checkpoint).save_pretrained(tmp_path)
    ours = reference.run(SEQUENCES)
    theirs = TransformersReference(tmp_path).run(SEQUENCES)
    for i, sequence in enumerate(SEQUENCES):
        assert ours.logits(i).shape == (len(sequence), 300)
        assert relative_error(ours.logits(i), theirs.logits(i)) < TOLERANCE
        for layer in range(3):
            assert relative_error(ours.keys(layer, i), theirs.keys(layer, i)) < TOLERANCE
            assert relative_error(ours.values(layer, i), theirs.values(layer, i)) < TOLERANCE


def test_it_is_the_decoder_that_is_traced(small):
    shape, checkpoint, reference = small
    decoder = Decoder(shape, 16, all_logits=True)
    state = {name: tensor.read(0, tensor.shape[0]).float() for name, tensor in canonical(checkpoint).items()}
    state["rotary_cos"], state["rotary_sin"] = rotary_tables(shape, 16)
    decoder.load_state_dict(state)
    tokens = torch.tensor(SEQUENCES[:1])
    caches = [torch.zeros(1, shape.num_kv_heads, 16, shape.head_dim) for _ in range(6)]
    with torch.inference_mode():
        whole, _ = decoder(tokens, torch.arange(8)[None], caches)
    assert relative_error(reference.run(SEQUENCES[:1]).logits(0), whole[0].numpy()) < TOLERANCE


def test_a_sequence_does_not_see_the_others(small):
    reference = small[2]
    together = reference.run(SEQUENCES)
    for i, sequence in enumerate(SEQUENCES):
        np.testing.assert_array_equal(together.keys(2, i), reference.run([sequence]).keys(2, 0))


def test_blocks_of_queries_change_nothing(small, monkeypatch):
    reference = small[2]
    whole = reference.run(SEQUENCES).logits(2)
    monkeypatch.setattr(reference_module, "QUERY_BLOCK", 5)
    assert relative_error(reference.run(SEQUENCES).logits(2), whole) < TOLERANCE


def test_blocks_of_head_rows_change_nothing(small, monkeypatch):
    _, checkpoint, _ = small
    head = checkpoint["model.embed_tokens.weight"]
    hidden = torch.randn(7, 48, generator=torch.Generator().manual_seed(1))
    whole = hidden @ head.read(0, 300).float().T
    monkeypatch.setattr(reference_module, "BLOCK_BYTES", 48 * 4 * 37)  # 37 rows: does not divide 300
    assert relative_error(head_logits(hidden, head), whole.numpy()) < TOLERANCE


def test_blocks_of_logits_cover_every_position_once(small, monkeypatch):
    run = small[2].run(SEQUENCES)
    monkeypatch.setattr(reference_module, "LOGITS_BLOCK", 6)
    seen = []
    for sequence, positions, logits in run.blocks():
        assert len(positions) <= 6
        for position, row in zip(positions, logits, strict=True):
            seen.append((sequence, position))
            np.testing.assert_allclose(row, run.logits(sequence, position, position + 1)[0], atol=1e-5)
    assert seen == [(i, p) for i, sequence in enumerate(SEQUENCES) for p in range(len(sequence))]


def test_only_the_positions_wanted(small):
    run = small[2].run(SEQUENCES)
    got = [(i, list(positions)) for i, positions, _ in run.blocks([[1, 3], [], [12]])]
    assert got == [(0, [1, 3]), (2, [12])]


def test_keeps_the_cache_of_the_positions_asked_for(small):
    reference = small[2]
    whole = reference.run(SEQUENCES)
    some = reference.run(SEQUENCES, keep_cache=[[0, 7], [], [12]])
    np.testing.assert_array_equal(some.keys(1, 0), whole.keys(1, 0)[:, [0, 7]])
    np.testing.assert_array_equal(some.values(2, 2), whole.values(2, 2)[:, [12]])
    assert some.keys(1, 1).shape[1] == 0
    assert reference.run(SEQUENCES, keep_cache=False).keys(0, 0).shape[1] == 0


class Counted:
    """Weights that note what is read, and how many of the tensors handed out are alive at once."""

    def __init__(self, tensor, log):
        self.tensor, self.log = tensor, log
        self.name, self.shape, self.dtype = tensor.name, tensor.shape, tensor.dtype

    def read(self, start, stop):
        block = self.tensor.read(start, stop)
        self.log.append((self.name, start, stop, weakref.ref(block)))
        return block


def test_each_layer_is_read_once_and_no_block_is_kept(small, monkeypatch):
    shape, checkpoint, _ = small
    log = []
    weights = {name: Counted(tensor, log) for name, tensor in canonical(checkpoint).items()}
    run = Reference(shape, weights).run(SEQUENCES)
    layers = [entry for entry in log if "layers." in entry[0]]
    rows = {name: sum(stop - start for n, start, stop, _ in layers if n == name) for name, *_ in layers}
    assert rows == {w.name: w.shape[0] for name, w in weights.items() if name.startswith("layers.")}
    order = [int(name.split(".")[2]) for name, *_ in layers]
    assert order == sorted(order)
    gc.collect()
    assert not [entry for entry in log if entry[3]() is not None]
    assert run.lengths == (8, 1, 13)


def test_one_layer_is_alive_whatever_their_number(monkeypatch):
    alive = weakref.WeakSet()
    most = 0
    original = reference_module.DecoderLayer.__init__

    def counted(self, shape):
        nonlocal most
        original(self, shape)
        alive.add(self)
        most = max(most, len(alive))

    monkeypatch.setattr(reference_module.DecoderLayer, "__init__", counted)
    shape = config(1, num_layers=7)
    Reference(shape, canonical(RandomCheckpoint(shape))).run([[2, 3]])
    assert most == 1
    gc.collect()
    assert not alive


def test_embedding_rows_are_read_in_few_small_blocks(monkeypatch):
    shape = config(1, vocab_size=5000)
    log = []
    weights = {name: Counted(t, log) for name, t in canonical(RandomCheckpoint(shape)).items()}
    sequence = [2, 4990, 7, 2500, 2510, 11, 4999]
    run = Reference(shape, weights).run([sequence])
    reads = [(start, stop) for name, start, stop, _ in log if "embed" in name]
    assert reads == [(2, 12), (2500, 2511), (4990, 5000)]
    whole = Reference(shape, canonical(RandomCheckpoint(shape))).run([sequence])
    np.testing.assert_array_equal(run.keys(0, 0), whole.keys(0, 0))


def test_shows_every_logit_once(small, monkeypatch):
    _, _, reference = small
    monkeypatch.setattr("gemma_export.exporter.parity.reference.BLOCK_BYTES", 4096)
    parts: list[np.ndarray] = []
    run = reference.run(
        SEQUENCES, observe=lambda name, x: parts.append(x.copy()) if name == "logits" else None
    )
    run.observe_logits()
    assert len(parts) > 1
    whole = np.concatenate([run.logits(i) for i in range(len(SEQUENCES))])
    # A product of other shape may add in another order.
    np.testing.assert_allclose(np.concatenate(parts[: -len(SEQUENCES)], axis=1), whole, atol=1e-5)


def test_observes_every_activation_and_changes_none(small):
    shape, _, reference = small
    seen: dict[str, list[np.ndarray]] = {}
    plain = reference.run(SEQUENCES[:1])
    run = reference.run(SEQUENCES[:1], observe=lambda name, x: seen.setdefault(name, []).append(x.copy()))
    assert "logits" not in seen
    np.testing.assert_array_equal(run.logits(0), plain.logits(0))
    inside = {
        "input_layernorm",
        "post_attention_layernorm",
        *(f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj")),
        *(f"self_attn.{name}" for name in ("query", "key", "scores", "attended")),
        *(f"mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj", "product")),
        "attention_residual",
        "mlp_residual",
    }
    layers = {f"layers.{i}.{name}" for i in range(3) for name in inside}
    assert set(seen) == layers | {"embedding", "norm", "logits"}
    residual = seen["embedding"][0] + seen["layers.0.self_attn.o_proj"][0][0]
    np.testing.assert_allclose(seen["layers.0.attention_residual"][0][0], residual, atol=1e-6)
    residual = residual + seen["layers.0.mlp.down_proj"][0][0]
    np.testing.assert_allclose(seen["layers.0.mlp_residual"][0][0], residual, atol=1e-6)
    np.testing.assert_array_equal(seen["layers.2.self_attn.key"][0][0], plain.keys(2, 0))
    query, key = seen["layers.1.self_attn.query"][0][0], plain.keys(1, 0)
    key = np.repeat(key, shape.num_query_heads // shape.num_kv_heads, axis=0)
    scores = seen["layers.1.self_attn.scores"][0].reshape(shape.num_query_heads, 8, 8)
    np.testing.assert_allclose(scores, query @ key.transpose(0, 2, 1), rtol=1e-4, atol=1e-5)


def test_transformers_shows_modules_of_the_same_names(small, tmp_path):
    _, checkpoint, reference = small
    transformers_model(small[0], checkpoint).save_pretrained(tmp_path)
    ours: dict[str, np.ndarray] = {}
    theirs: dict[str, np.ndarray] = {}
    reference.run(SEQUENCES[:1], observe=lambda name, x: ours.update({name: x.copy()}))
    TransformersReference(tmp_path).run(
        SEQUENCES[:1], observe=lambda name, x: theirs.update({name: x.copy()})
    )
    assert len(theirs) == 3 * 9 + 1
    for name, values in theirs.items():
        assert relative_error(values.reshape(ours[name].shape), ours[name]) < TOLERANCE


@pytest.mark.parametrize("sequence", [[], [2, 300], [2, -1]], ids=["empty", "too large", "negative"])
def test_refuses_what_no_model_can_run(small, sequence):
    with pytest.raises(ValueError, match="sequence 1"):
        small[2].run([[2, 3], sequence])


def test_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingDependencyError, match=r'pip install "gemma-export\[parity\]"'):
        TransformersReference("anywhere")


def test_says_what_transformers_cannot_load(tmp_path):
    pytest.importorskip("transformers")
    with pytest.raises(CheckpointError, match="transformers cannot load"):
        TransformersReference(tmp_path)
