"""The parity gate against bundles that are wrong in the ways exporters are."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from support.gate import CONFIG, FakeCache, FakeSession, check
from torch.nn import functional

from gemma_export.exporter import decoder as decoder_module
from gemma_export.exporter.decoder import rotary_tables

pytestmark = pytest.mark.usefixtures("one_thread")


def missing_embedding_scale(session, monkeypatch):
    session.decoder.embedding_scale = 1.0


def rounded_embedding_scale(session, monkeypatch):
    session.decoder.embedding_scale = round(session.decoder.embedding_scale, 1)


def exact_gelu(session, monkeypatch):
    for layer in session.decoder.layers:
        mlp = layer.mlp
        monkeypatch.setattr(
            mlp,
            "forward",
            lambda x, mlp=mlp: mlp.down_proj(functional.gelu(mlp.gate_proj(x)) * mlp.up_proj(x)),
        )


def wrong_rope_base(session, monkeypatch):
    cos, sin = rotary_tables(replace(CONFIG, rope_theta=1000.0), session.max_length)
    session.decoder.rotary_cos, session.decoder.rotary_sin = cos, sin


def norm_without_one(session, monkeypatch):
    session.decoder.layers[1].input_layernorm.weight.data -= 1


def beginning_ignored(session, monkeypatch):
    step = session.step
    monkeypatch.setattr(session, "step", lambda tokens, cache: step(np.where(tokens == 2, 3, tokens), cache))


def valid_length_off_by_one(session, monkeypatch):
    """Decoding overwrites the newest slot."""
    monkeypatch.setattr(
        session,
        "positions",
        lambda cache, count: torch.arange(count)[None] + max(0, cache.length - (cache.length > 0)),
    )


def sees_an_empty_slot(session, monkeypatch):
    original = decoder_module.causal_mask
    step = session.step

    def with_wrong_mask(tokens, cache):
        with monkeypatch.context() as patch:
            patch.setattr(
                decoder_module, "causal_mask", lambda positions, *size: original(positions + 1, *size)
            )
            return step(tokens, cache)

    monkeypatch.setattr(session, "step", with_wrong_mask)


def upper_left_causality(session, monkeypatch):
    """Prefill from an empty cache is right, and every later step sees the first slots only."""
    original = decoder_module.causal_mask
    step = session.step

    def with_wrong_mask(tokens, cache):
        with monkeypatch.context() as patch:
            rows = torch.arange(tokens.shape[1])[None]
            patch.setattr(decoder_module, "causal_mask", lambda positions, *size: original(rows, *size))
            return step(tokens, cache)

    monkeypatch.setattr(session, "step", with_wrong_mask)


DEFECTS = {
    missing_embedding_scale: "KL",
    rounded_embedding_scale: "relative error",
    exact_gelu: "relative error",
    wrong_rope_base: "keys of layer 0",
    norm_without_one: "keys of layer 1",
    beginning_ignored: "keys of layer 0",
    valid_length_off_by_one: "keys of layer 0",
    sees_an_empty_slot: "keys of layer 1",
    upper_left_causality: "keys of layer 1",
}


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda defect: defect.__name__)
def test_a_planted_defect_fails(defect, monkeypatch):
    session = FakeSession()
    defect(session, monkeypatch)
    report = check(session)
    assert report.verdict == "fail"
    assert DEFECTS[defect] in " ".join(report.reasons)
    if defect not in (rounded_embedding_scale, exact_gelu):  # These two are small, and only fp32 sees them.
        assert check(session, precision="bf16").verdict == "fail"


def test_wrong_keys_are_seen_even_where_the_logits_are_right(monkeypatch):
    class Off(FakeCache):
        def keys(self, layer):
            return super().keys(layer) * (1.01 if layer == 1 else 1)

    session = FakeSession()
    monkeypatch.setattr(session, "new_cache", lambda: Off(session.max_length))
    report = check(session)
    assert report.reasons == ("the cached keys of layer 1 are off by 0.01 of the largest, above 0.0002",)
    assert check(session, precision="bf16").verdict == "pass"


@pytest.mark.parametrize("value", [math.nan, math.inf], ids=["NaN", "infinity"])
def test_a_logit_that_is_no_number_fails(value, monkeypatch):
    session = FakeSession()
    step = session.step

    def broken(tokens, cache):
        logits = step(tokens, cache).copy()
        if cache.length == 20:
            logits[0, -1, 17] = value
        return logits

    monkeypatch.setattr(session, "step", broken)
    report = check(session, precision="bf16")
    assert report.verdict == "fail"
    assert "the bundle gives NaN or infinite logits" in report.reasons[0]
    json.dumps(report.to_json(), allow_nan=False)
    json.dumps(report.summary(), allow_nan=False)


def test_a_cached_nan_fails(monkeypatch):
    class Broken(FakeCache):
        def values(self, layer):
            values = super().values(layer).copy()
            values[0, 0, 0, 0] = math.nan
            return values

    session = FakeSession()
    monkeypatch.setattr(session, "new_cache", lambda: Broken(session.max_length))
    report = check(session, precision="bf16")
    assert report.reasons == (
        "the cached values of layer 0 (and those of 2 later layers) are off by nan of the largest, above 0.1",
    )
    assert report.summary()["max_value_error"] is None
