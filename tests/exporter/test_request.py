"""What can be asked for, and what is refused with a way out."""

from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest

from gemma_export.errors import UsageError
from gemma_export.exporter.config import preset
from gemma_export.exporter.request import PRECISIONS, SCHEMES, TARGETS, BuildRequest, scheme_for


def test_everything_the_help_names_can_be_built() -> None:
    assert TARGETS == ("cpu", "onnx")
    assert PRECISIONS == ("fp32", "fp16", "bf16")
    assert set(SCHEMES) == {(target, precision) for target in TARGETS for precision in PRECISIONS}


@pytest.mark.parametrize(("target", "precision"), SCHEMES, ids=lambda value: value)
def test_scheme_keeps_the_precision(target: str, precision: str) -> None:
    scheme = scheme_for(target, precision)
    assert scheme.storage == {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}[precision]
    # A CPU computes in fp32; any other target in the format of its weights.
    assert scheme.compute == scheme.cache == ("float32" if target == "cpu" else scheme.storage)


def test_request_is_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        BuildRequest(size="tiny").size = "2b"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("values", "message", "hint"),
    [
        ({"size": "3b"}, "no size '3b'", "tiny, 2b, 7b"),
        ({"size": "tiny", "precision": "int8"}, "'int8' cannot be built", "fp32, fp16, bf16"),
        ({"size": "tiny", "target": "tpu"}, "no target 'tpu'", "cpu and onnx"),
        ({}, "Neither a size nor a checkpoint", "--checkpoint PATH"),
        ({"random_weights": True}, "needs a size", "tiny, 2b, 7b"),
        ({"random_weights": True, "size": "2b", "checkpoint": Path("x")}, "contradict", "--checkpoint"),
        ({"size": "tiny", "seed": 0}, "--seed", "Leave --seed out"),
        ({"size": "tiny", "random_weights": True, "seed": -1}, "is negative", "0 or more"),
        ({"size": "tiny", "max_length": 0}, "no slot", "at least 1"),
        ({"size": "tiny", "logits": "some"}, "--logits some", "last or all"),
        ({"size": "tiny", "parity": "some"}, "--parity some", "none, quick or full"),
        ({"size": "tiny", "parity": "none", "allow_parity_failure": True}, "contradict", "Leave one"),
    ],
    ids=lambda value: " ".join(value) or "nothing" if isinstance(value, dict) else "",
)
def test_impossible_requests(values: dict[str, Any], message: str, hint: str) -> None:
    with pytest.raises(UsageError) as refused:
        BuildRequest(**values)
    assert message in refused.value.message
    assert hint in refused.value.hint


def test_cache_slots() -> None:
    config = preset("2b")
    assert BuildRequest(size="2b").cache_slots(config) == 8192
    assert BuildRequest(size="2b", max_length=1).cache_slots(config) == 1
    assert BuildRequest(size="2b", max_length=8192).cache_slots(config) == 8192
    with pytest.raises(UsageError, match="--max-length 8193 is more than gemma-2b was trained for"):
        BuildRequest(size="2b", max_length=8193).cache_slots(config)


def test_output_folder() -> None:
    config = preset("7b")
    assert BuildRequest(size="7b", precision="bf16").output_folder(config) == Path(
        "bundles/gemma-7b-bf16-cpu"
    )
    assert BuildRequest(size="7b", output=Path("b")).output_folder(config) == Path("b")
