"""The reference of the second generation against transformers', beyond the window and around its end.

Each feature is then taken out of our side alone: what a test cannot see missing, it cannot see wrong.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support.oracle import (
    FAMILIES,
    RELATIVE_ERROR,
    random_gemma,
    random_tokens,
    relative_error,
    save_checkpoint,
)

from gemma_export.exporter.checkpoints.checkpoint import open_checkpoint
from gemma_export.exporter.checkpoints.weights import canonical_weights, config_for
from gemma_export.exporter.config import GemmaConfig
from gemma_export.exporter.decoder import DecoderLayer
from gemma_export.exporter.parity import reference as reference_module
from gemma_export.exporter.parity.reference import Reference, ReferenceRun
from gemma_export.exporter.parity.reference_transformers import TransformersReference

pytestmark = pytest.mark.usefixtures("one_thread")

pytest.importorskip("transformers")

WINDOW = 64
# One token before the window is full, at its end, one after it, and far beyond it.
LENGTHS = (WINDOW - 1, WINDOW, WINDOW + 1, 600)
SEQUENCES = [random_tokens(length, seed=length) for length in LENGTHS]
VISIBLE = 20 * RELATIVE_ERROR


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    family = FAMILIES["gemma2"]
    return save_checkpoint(
        random_gemma(family), tmp_path_factory.mktemp("gemma2") / "checkpoint", family.dtype
    )


@pytest.fixture(scope="module")
def theirs(folder: Path) -> ReferenceRun:
    return TransformersReference(folder).run(SEQUENCES)


@pytest.fixture(scope="module")
def reference(folder: Path) -> Callable[..., Reference]:
    checkpoint = open_checkpoint(folder)
    config = config_for(checkpoint)
    weights = canonical_weights(checkpoint, config)
    return lambda **changes: Reference(replace(config, **changes), weights)


def errors(ours: ReferenceRun, theirs: ReferenceRun) -> list[float]:
    """Of the logits after the last token of each sequence."""
    last = [length - 1 for length in LENGTHS]
    return [
        relative_error(theirs.logits(i, at, at + 1), ours.logits(i, at, at + 1)) for i, at in enumerate(last)
    ]


def test_every_position_is_that_of_transformers(
    reference: Callable[..., Reference], theirs: ReferenceRun
) -> None:
    ours = reference().run(SEQUENCES)
    for i, length in enumerate(LENGTHS):
        assert relative_error(theirs.logits(i), ours.logits(i)) < RELATIVE_ERROR
        for layer in range(2):
            for name in ("keys", "values"):
                expected, found = getattr(theirs, name)(layer, i), getattr(ours, name)(layer, i)
                assert expected.shape == (2, length, 16)
                assert relative_error(expected, found) < RELATIVE_ERROR


def test_the_logits_are_capped(reference: Callable[..., Reference]) -> None:
    run = reference().run(SEQUENCES[:1])
    assert np.abs(run.logits(0)).max() < 3.0
    assert np.abs(reference(final_softcap=None).run(SEQUENCES[:1]).logits(0)).max() > 4.0


@pytest.mark.parametrize(
    ("changes", "wrong"),
    [
        # Whatever has to do with the window shows where it is full, and no sooner.
        ({"layer_kinds": ("global", "local")}, [False, False, True, True]),
        ({"layer_kinds": ("global", "global")}, [False, False, True, True]),
        ({"layer_kinds": ("local", "local")}, [False, False, True, True]),
        ({"sliding_window": WINDOW + 1}, [False, False, True, True]),
        ({"sliding_window": WINDOW - 1}, [False, True, True, True]),
        ({"attention_softcap": None}, [True] * 4),
        ({"final_softcap": None}, [True] * 4),
        ({"query_pre_attn_scalar": None}, [True] * 4),
    ],
    ids=[
        "window inverted",
        "window dropped",
        "window everywhere",
        "window too wide",
        "window too narrow",
        "no attention soft-cap",
        "no final soft-cap",
        "scale of head_dim",
    ],
)
def test_a_feature_that_is_taken_out_is_seen(
    changes: dict[str, object],
    wrong: list[bool],
    reference: Callable[..., Reference],
    theirs: ReferenceRun,
) -> None:
    found = errors(reference(**changes).run(SEQUENCES), theirs)
    assert [error > RELATIVE_ERROR for error in found] == wrong, found
    assert all(error > VISIBLE for error in found if error > RELATIVE_ERROR), found


@pytest.mark.parametrize(
    "name",
    [
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ],
)
def test_a_norm_that_is_taken_out_is_seen(
    name: str,
    reference: Callable[..., Reference],
    theirs: ReferenceRun,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class WithoutNorm(DecoderLayer):
        def __init__(self, config: GemmaConfig) -> None:
            super().__init__(config)
            setattr(self, name, torch.nn.Identity())

    monkeypatch.setattr(reference_module, "DecoderLayer", WithoutNorm)
    assert min(errors(reference().run(SEQUENCES), theirs)) > VISIBLE


def test_a_soft_cap_behind_the_mask_is_seen(
    reference: Callable[..., Reference], theirs: ReferenceRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The operator's first definition had it there: what is masked then weighs e^-cap, not nothing.
    from gemma_export.exporter import decoder as decoder_module

    def capped_behind(scores: torch.Tensor, dim: int) -> torch.Tensor:
        return scores.div(5.0).tanh().mul(5.0).softmax(dim)

    monkeypatch.setattr(decoder_module.torch, "softmax", capped_behind)
    found = errors(reference(attention_softcap=None).run(SEQUENCES), theirs)
    assert min(found[2:]) > VISIBLE
