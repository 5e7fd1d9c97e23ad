"""The graph of rolling caches gives what a decoder gives whose caches keep every position."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from support.checkpoints import LITTLE_2
from support.graphs import cloned, random_weights

from gemma_export.errors import GraphError
from gemma_export.exporter.decoder import Decoder, rotary_tables
from gemma_export.exporter.trace import bind_weights, trace
from gemma_export.graphs import schedule, spec
from gemma_export.graphs.passes.scatter_cache import scatter_cache
from gemma_export.runtime.rolling import RollingCache

LENGTH = 40
# Layers are local, global, global, local: two of a kind follow each other, and the last is as the first.
CONFIG = replace(LITTLE_2, num_layers=4, head_dim=16, layer_kinds=("local", "global", "global", "local"))
ROLLING = RollingCache(layers=(0, 3), window=8, chunk=5, slots=12, saved_per_row=0)
ROWS = 2
TOLERANCE = 5e-6
"""Of the largest logit. Only the order of sums differs: some 50 roundings of 2^-24 on values around 1."""

Logits = npt.NDArray[np.float32]


@pytest.fixture(scope="module")
def traced() -> ir.Model:
    return trace(CONFIG, LENGTH, all_logits=True, rolling=ROLLING)


@pytest.fixture
def canonical(traced: ir.Model) -> ir.Model:
    model = raw(traced)
    schedule.canonicalize(model)
    return model


def raw(traced: ir.Model) -> ir.Model:
    model = cloned(traced)
    bind_weights(model, CONFIG, random_weights(CONFIG))
    return model


@pytest.fixture(scope="module")
def tokens() -> npt.NDArray[np.int64]:
    return np.random.default_rng(5).integers(0, CONFIG.vocab_size, (ROWS, LENGTH))


@pytest.fixture(scope="module")
def expected(tokens: npt.NDArray[np.int64]) -> Logits:
    """Logits [B, T, V] of the whole text in one step, over caches of all positions."""
    decoder, weights = Decoder(CONFIG, LENGTH, all_logits=True).eval(), random_weights(CONFIG)
    for name, parameter in decoder.named_parameters():
        parameter.data = weights[name].tensor
    decoder.rotary_cos, decoder.rotary_sin = rotary_tables(CONFIG, LENGTH)
    shape = (ROWS, CONFIG.num_kv_heads, LENGTH, CONFIG.head_dim)
    caches = [torch.zeros(shape) for _ in range(2 * CONFIG.num_layers)]
    positions = torch.arange(LENGTH).expand(ROWS, LENGTH)
    with torch.no_grad():
        logits: Logits = decoder(torch.from_numpy(tokens), positions, caches)[0].numpy()
    return logits


class Running:
    """A graph in onnxruntime, with caches of its own that it is given back after each step."""

    def __init__(self, model: ir.Model) -> None:
        options = ort.SessionOptions()
        options.log_severity_level = 4
        self.session = ort.InferenceSession(
            ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        self.names = [output.name for output in self.session.get_outputs()]
        self.caches = {
            # What is in slots that were never written must not matter.
            str(value.name): np.full((ROWS, *value.shape[1:]), 7.0, np.float32)
            for value in model.graph.inputs[2:]
            if value.shape is not None
        }

    def step(self, tokens: npt.NDArray[np.int64], starts: Sequence[int]) -> Logits:
        positions = np.array(starts)[:, None] + np.arange(tokens.shape[1])
        feeds = {"input_ids": tokens, "position_ids": positions, **self.caches}
        results = dict(zip(self.names, self.session.run(self.names, feeds), strict=True))
        logits: Logits = results.pop("logits")
        self.caches = {name.replace("present", "past_key_values"): made for name, made in results.items()}
        return logits


def run(model: ir.Model, tokens: npt.NDArray[np.int64], sizes: Sequence[int]) -> Logits:
    """Logits [B, T, V] of tokens that are run in steps of some sizes in turn, in the parts that they have."""
    running, found, start = Running(model), [], 0
    while start < LENGTH:
        size = min(sizes[len(found) % len(sizes)], LENGTH - start)
        logits = [
            running.step(tokens[:, start + part.start : start + part.stop], [start + part.start] * ROWS)
            for part in ROLLING.parts(np.array([start]), size)
        ]
        found.append(np.concatenate(logits, axis=1))
        start += size
    return np.concatenate(found, axis=1)


@pytest.mark.parametrize("sizes", [(1,), (3,), (5,), (7, 1, 4), (LENGTH,)], ids=str)
def test_steps_of_any_size(
    sizes: Sequence[int], canonical: ir.Model, tokens: npt.NDArray[np.int64], expected: Logits
) -> None:
    np.testing.assert_allclose(
        run(canonical, tokens, sizes), expected, rtol=0, atol=TOLERANCE * np.abs(expected).max()
    )


def test_lowered_for_a_device(canonical: ir.Model, tokens: npt.NDArray[np.int64], expected: Logits) -> None:
    schedule.lower(canonical, "onnx", torch.float32, torch.float32)
    shapes = [value.shape[2] for value in canonical.graph.inputs[2:] if value.shape is not None]
    assert shapes == [12, 12, LENGTH, LENGTH, LENGTH, LENGTH, 12, 12]
    np.testing.assert_allclose(
        run(canonical, tokens, (4, 1)), expected, rtol=0, atol=TOLERANCE * np.abs(expected).max()
    )


def test_rows_at_positions_of_their_own(
    canonical: ir.Model, tokens: npt.NDArray[np.int64], expected: Logits
) -> None:
    starts, filled = [3, 17], []
    for length in starts:
        alone = Running(canonical)
        for start in range(length):
            alone.step(tokens[:, start : start + 1], [start] * ROWS)
        filled.append(alone.caches)
    running = Running(canonical)
    running.caches = {
        name: np.stack([caches[name][row] for row, caches in enumerate(filled)]) for name in running.caches
    }
    while starts[1] < LENGTH:
        step = np.array([[tokens[row, start]] for row, start in enumerate(starts)])
        logits = running.step(step, starts)
        for row, start in enumerate(starts):
            np.testing.assert_allclose(
                logits[row, 0], expected[row, start], rtol=0, atol=TOLERANCE * np.abs(expected).max()
            )
        starts = [start + 1 for start in starts]


@pytest.mark.parametrize(
    ("start", "size"), [(0, 6), (7, 6), (10, 3)], ids=["too long", "too long later", "beyond the last slot"]
)
def test_what_would_overwrite_too_much_fails(
    start: int, size: int, canonical: ir.Model, tokens: npt.NDArray[np.int64]
) -> None:
    with pytest.raises(Exception, match="exceeds max_sequence_length"):
        Running(canonical).step(tokens[:, :size], [start, start])


def another_modulus(model: ir.Model) -> None:
    constant = next(node for node in model.graph if node.op_type == "Mod" and is_written(node)).inputs[1]
    assert constant is not None
    constant.const_value = ir.tensor(np.array(11))


def written_at_positions(model: ir.Model) -> None:
    writes = [node for node in model.graph if node.op_type == "TensorScatter"]
    rolling, plain = writes[0], writes[2]
    rolling.replace_input_with(2, plain.inputs[2])


def all_written_modulo(model: ir.Model) -> None:
    writes = [node for node in model.graph if node.op_type == "TensorScatter"]
    writes[2].replace_input_with(2, writes[0].inputs[2])


def is_written(node: ir.Node) -> bool:
    """Whether a remainder is of positions, and not of what the mask asks for."""
    value = node.inputs[0]
    return value is not None and value.name == "position_ids"


def a_mask_of_all_positions(model: ir.Model) -> None:
    attentions = [node for node in model.graph if node.op_type == "Attention"]
    attentions[0].replace_input_with(3, attentions[1].inputs[3])


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (another_modulus, "past_key_values.0.key of 12 slots is written at positions modulo 11"),
        (written_at_positions, "past_key_values.0.key of 12 slots is written at positions modulo nothing"),
        (all_written_modulo, "past_key_values.1.key of 40 slots is written at positions modulo 12"),
        (a_mask_of_all_positions, "past_key_values.0.key has 12 slots, and its mask 40"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_a_graph_that_writes_elsewhere_breaks_a_rule(
    change: Callable[[ir.Model], None], problem: str, canonical: ir.Model
) -> None:
    assert spec.caches_are_written_at_their_positions(canonical) is None
    change(canonical)
    assert spec.caches_are_written_at_their_positions(canonical) == problem
    with pytest.raises(GraphError, match="caches are written at their positions"):
        spec.CANONICAL.check(canonical)


def test_a_write_that_wraps_elsewhere_is_no_scatter(traced: ir.Model) -> None:
    model = raw(traced)
    schedule.run(model, schedule.CANONICAL[:1])
    another_modulus(model)
    assert scatter_cache(model) == 4  # The two global layers' alone.
