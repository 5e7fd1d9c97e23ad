"""Drafts and saved caches on bundles of every precision for a CPU: the text is the one without them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gemma_export.exporter.calibration_request import CalibrationRequest
from gemma_export.exporter.pipeline import BuildResult
from gemma_export.runtime.native import kernels
from gemma_export.runtime.session import Session, load

BUILDS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"precision": "bf16"},
    "fp16": {"precision": "fp16"},
    "int8 by token": {"precision": "int8", "scheme_name": "w8a8-dynamic", "no_calibration": True},
    "int8 in blocks": {"precision": "int8", "scheme_name": "w8a16", "no_calibration": True},
    "int4": {"precision": "int4", "no_calibration": True},
    "int8, cache of 8 bits": {
        "precision": "int8",
        "kv_cache": "int8",
        "calibration": CalibrationRequest(samples=8, length=32),
    },
}

PROMPTS = [
    "ROMEO:\nI am a man that is a man.\n\nJULIET:\n",
    "The monster",
    "KING RICHARD III:\nNow is the winter",
    "When I reflected on his crimes, when I reflected on",
]

ROUNDING = 1e-4
"""What two logits, of some 20, differ by at most between a step of one token and one of several: attention
sums in another order."""
CODES = 0.4
"""Likewise where inputs of products are rounded to 8 bits, and one that lies between two takes the other. In
500 tokens a logit differs by 0.12 at most, and two are compared."""


@pytest.fixture(params=list(BUILDS))
def built(request: pytest.FixtureRequest, build_once: Callable[..., BuildResult]) -> tuple[Session, float]:
    """A session, and how near two logits must be to change places."""
    options = BUILDS[request.param]
    session = load(build_once(size="tiny", max_length=256, **options).path, threads=1)
    return session, CODES if options.get("precision", "").startswith("int") else ROUNDING


@pytest.mark.slow
def test_drafts_change_no_token(built: tuple[Session, float]) -> None:
    session, tie = built
    accepted = 0
    for prompt in PROMPTS:
        options: dict[str, Any] = {"max_new_tokens": 120, "stop_tokens": ()}
        plain = session.generate(prompt, **options)
        drafted = session.generate(prompt, draft_tokens=7, **options)
        accepted += drafted.stats.accepted_tokens
        pairs = zip(plain.tokens, drafted.tokens, strict=True)
        parted = next((place for place, (one, other) in enumerate(pairs) if one != other), None)
        if parted is not None:
            # The two tokens are as good as equally likely after the text up to there.
            text = [*session.tokenizer.encode(prompt), *plain.tokens[:parted]]
            logits = session.logits(text)[-1]
            one, other = logits[plain.tokens[parted]], logits[drafted.tokens[parted]]
            assert abs(one - other) < tie
            assert min(one, other) > np.sort(logits)[-3:].min() - tie
    assert accepted > 100


@pytest.mark.slow
@pytest.mark.skipif(
    kernels() != "avx512-vnni", reason="other kernels' sums depend on how many tokens come at once"
)
@pytest.mark.parametrize("name", ["int8 in blocks", "int4"])
def test_with_our_kernels_drafts_change_no_bit(name: str, build_once: Callable[..., BuildResult]) -> None:
    session = load(build_once(size="tiny", max_length=256, **BUILDS[name]).path, threads=1)
    tokens = session.tokenizer.encode("".join(PROMPTS))[:80]
    one_by_one = session.new_cache()
    expected = [session.step([[token]], one_by_one)[0, -1] for token in tokens]
    for size in (2, 5, 13, 33):
        cache = session.new_cache()
        for start in range(0, len(tokens), size):
            step = tokens[start : start + size]
            logits = session.step([step], cache)[0, -1]
            np.testing.assert_array_equal(
                logits, expected[start + len(step) - 1], err_msg=f"{size} at {start}"
            )
    for prompt in PROMPTS:
        options: dict[str, Any] = {"max_new_tokens": 120, "stop_tokens": ()}
        plain = session.generate(prompt, **options)
        assert session.generate(prompt, draft_tokens=7, **options).tokens == plain.tokens


@pytest.mark.slow
def test_a_saved_cache_is_the_cache(built: tuple[Session, float], tmp_path: Path) -> None:
    session, _ = built
    prompt = PROMPTS[0]
    cache = session.new_prompt_cache()
    session.read(prompt, cache)
    session.save_cache(cache, tmp_path / "cache")
    loaded = session.load_cache(tmp_path / "cache")
    longer = f"{prompt}What man"
    first, second = (
        session.generate(longer, prompt_cache=one, max_new_tokens=20, stop_tokens=())
        for one in (cache, loaded)
    )
    assert first.tokens == second.tokens
    assert second.stats.reused_tokens == session.count_tokens(prompt)
