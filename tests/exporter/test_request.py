"""What can be asked for, and what is refused with a way out."""

import math
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any

import pytest

from gemma_export.calibration.text import FEWEST_TOKENS
from gemma_export.errors import UsageError
from gemma_export.exporter.config import preset
from gemma_export.exporter.request import (
    OBSERVERS,
    PRECISIONS,
    SCHEMES,
    TARGETS,
    BuildRequest,
    CalibrationRequest,
    scheme_for,
)

FILE = Path("text.txt")
INT8: dict[str, Any] = {"size": "tiny", "precision": "int8"}
W8A8 = INT8 | {"target": "onnx", "scheme_name": "w8a8"}


def on(**options: Any) -> CalibrationRequest:
    return CalibrationRequest(**options)


def test_everything_the_help_names_can_be_built() -> None:
    assert TARGETS == ("cpu", "onnx", "rtx", "tensorrt", "cuda")
    assert PRECISIONS == ("fp32", "fp16", "bf16", "int8", "int4")
    everything = {(target, precision) for target in TARGETS for precision in PRECISIONS}
    # TensorRT refuses attention in fp32, and onnxruntime has none for CUDA: there is nothing to build.
    assert everything - set(SCHEMES) == {("rtx", "fp32"), ("tensorrt", "fp32"), ("cuda", "fp32")}


@pytest.mark.parametrize(("target", "precision"), SCHEMES, ids=lambda value: value)
def test_scheme_keeps_the_precision(target: str, precision: str) -> None:
    names = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
    for scheme in SCHEMES[target, precision]:
        assert scheme_for(target, precision, scheme.name) is scheme
        assert scheme.storage == names.get(precision, precision)
        assert (scheme.products is not None) == precision.startswith("int")
        # A CPU computes in fp32; any other target in the format of its weights, or in fp16 around integers.
        assert scheme.compute == scheme.cache == ("float32" if target == "cpu" else scheme.floating_storage)
        if scheme.products is not None:
            assert scheme.products.bits == int(precision.removeprefix("int"))


def test_the_first_scheme_is_the_default() -> None:
    assert scheme_for("cpu", "int8").name == BuildRequest(**INT8).scheme.name == "w8a16"
    assert scheme_for("onnx", "int8").name == scheme_for("rtx", "int8").name == "w8a16"
    assert scheme_for("tensorrt", "int8").name == "w8a8"
    assert BuildRequest(**W8A8).scheme.products.form == "w8a8-tensor"  # type: ignore[union-attr]


@pytest.mark.parametrize(("target", "precision"), SCHEMES, ids=lambda value: value)
def test_every_block_of_a_scheme_can_be_asked_for(target: str, precision: str) -> None:
    for scheme in SCHEMES[target, precision]:
        for block in () if scheme.products is None else scheme.products.blocks:
            request = BuildRequest(
                size="tiny", target=target, precision=precision, scheme_name=scheme.name, block=block
            )
            assert request.scheme is scheme


def test_request_is_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        BuildRequest(size="tiny").size = "2b"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("values", "message", "hint"),
    [
        ({"size": "3b"}, "no size '3b'", "tiny, tiny2, 2b, 7b"),
        ({"size": "tiny", "precision": "int2"}, "'int2' cannot be built", "fp32, fp16, bf16, int8, int4"),
        ({"size": "tiny", "target": "tpu"}, "no target 'tpu'", "cpu, onnx, rtx, tensorrt, cuda"),
        ({}, "Neither a size nor a checkpoint", "--checkpoint PATH"),
        ({"random_weights": True}, "needs a size", "tiny, tiny2, 2b, 7b"),
        ({"random_weights": True, "size": "2b", "checkpoint": Path("x")}, "contradict", "--checkpoint"),
        ({"size": "tiny", "seed": 0}, "--seed", "Leave --seed out"),
        ({"size": "tiny", "random_weights": True, "seed": -1}, "is negative", "0 or more"),
        ({"size": "tiny", "max_length": 0}, "no slot", "at least 1"),
        ({"size": "tiny", "logits": "some"}, "--logits some", "last or all"),
        ({"size": "tiny", "parity": "some"}, "--parity some", "none, quick or full"),
        ({"size": "tiny", "parity": "none", "allow_parity_failure": True}, "contradict", "Leave one"),
        # How a precision is kept
        (INT8 | {"scheme_name": "w8a8"}, "no scheme 'w8a8' of int8 for the target cpu", "--target onnx"),
        (INT8 | {"scheme_name": "fastest"}, "no scheme 'fastest'", "w8a16 or w8a8-dynamic"),
        ({"size": "tiny", "scheme_name": "w8a16"}, "no scheme 'w8a16' of fp32", "--precision int8"),
        (
            INT8 | {"scheme_name": "w8a8-dynamic", "block": 64},
            "w8a8-dynamic has no blocks",
            "Leave --block out",
        ),
        (INT8 | {"scheme_name": "w8a16", "block": 48}, "Blocks of 48 columns", "256, 128, 64, 32"),
        ({"size": "tiny", "block": 32}, "fp32 has no blocks", "Leave --block out"),
        # The cache
        (INT8 | {"kv_cache": "int4"}, "--kv-cache int4", "float or int8"),
        (INT8 | {"kv_cache": "int8", "target": "onnx"}, "8 bits cannot be built", "--target cpu"),
        # Calibration where nothing is calibrated
        ({"size": "tiny", "calibration": on(data=FILE)}, "--calibration-data", "--precision int8"),
        ({"size": "tiny", "calibration": on(samples=8)}, "--calibration-samples", "--precision int8"),
        ({"size": "tiny", "calibration": on(length=32)}, "--calibration-length", "--precision int8"),
        ({"size": "tiny", "calibration": on(seed=0)}, "--calibration-seed", "--precision int8"),
        ({"size": "tiny", "calibration": on(observer="entropy")}, "--observer", "--precision int8"),
        ({"size": "tiny", "scales": FILE}, "--scales is about calibration", "Leave --scales out"),
        ({"size": "tiny", "no_calibration": True}, "fp32 has nothing to calibrate", "--no-calibration"),
        # Two ways to get scales
        (
            INT8 | {"scales": FILE, "calibration": on(data=FILE)},
            "--scales and --calibration-data",
            "Leave one",
        ),
        (INT8 | {"scales": FILE, "calibration": on(seed=1)}, "--scales and --calibration-seed", "Leave one"),
        (INT8 | {"scales": FILE, "no_calibration": True}, "--scales and --no-calibration", "Leave one"),
        (INT8 | {"no_calibration": True, "calibration": on(data=FILE)}, "contradict", "--no-calibration"),
        (
            INT8 | {"scheme_name": "w8a16", "block": 32, "scales": FILE},
            "--scales and --block contradict",
            "calibrate --block 32",
        ),
        # What only a calibration finds
        (W8A8 | {"no_calibration": True}, "w8a8 needs the ranges of activations", "--scheme w8a16"),
        (
            INT8 | {"target": "tensorrt", "no_calibration": True},
            "w8a8 needs the ranges of activations",
            "--scheme w8a16",
        ),
        (INT8 | {"no_calibration": True, "kv_cache": "int8"}, "keys and values", "--kv-cache"),
        (INT8 | {"calibration": on(observer="absmax")}, "nothing to observe", "--scheme w8a8"),
        # Budgets
        ({"size": "tiny", "max_kl": 0.1}, "with fp32 none is quantized", "--precision int8"),
        (
            {"size": "tiny", "precision": "bf16", "max_perplexity_increase": 1.0},
            "with bf16",
            "--precision int8",
        ),
        ({"size": "tiny", "max_kl": 0.1}, "with fp32 none", "Leave --max-kl out"),
        ({"size": "tiny", "kv_cache": "int8"}, "goes with quantized weights", "--precision int8"),
        (INT8 | {"max_kl": -0.1}, "--max-kl -0.1", "at least 0"),
        (INT8 | {"max_kl": math.nan}, "--max-kl nan", "at least 0"),
        (INT8 | {"max_perplexity_increase": math.inf}, "--max-perplexity-increase inf", "at least 0"),
    ],
    ids=lambda value: " ".join(map(str, value)) or "nothing" if isinstance(value, dict) else "",
)
def test_impossible_requests(values: dict[str, Any], message: str, hint: str) -> None:
    with pytest.raises(UsageError) as refused:
        BuildRequest(**values)
    assert message in refused.value.message
    assert hint in refused.value.hint


@pytest.mark.parametrize(
    ("options", "message", "hint"),
    [
        ({"samples": 0}, "--calibration-samples 0", "at least 1"),
        ({"samples": -3}, "--calibration-samples -3", "at least 1"),
        ({"length": 1}, "--calibration-length 1", "at least 2"),
        ({"length": 0}, "--calibration-length 0", "at least 2"),
        ({"seed": -1}, "--calibration-seed -1", "0 or more"),
        ({"observer": "median"}, "--observer median", "absmax, percentile, entropy, mse"),
        ({"samples": 3}, "3 samples of 64 tokens are 192", "--calibration-samples 4"),
        ({"samples": 3, "length": 85}, "are 255 at most", "--calibration-samples 4"),
        ({"length": 7}, "32 samples of 7 tokens", "--calibration-samples 37"),
    ],
    ids=str,
)
def test_impossible_calibrations(options: dict[str, Any], message: str, hint: str) -> None:
    with pytest.raises(UsageError) as refused:
        CalibrationRequest(**options)
    assert message in refused.value.message
    assert hint in refused.value.hint


@pytest.mark.parametrize(
    "values",
    [
        INT8 | {"calibration": on(data=FILE, samples=1, length=256, seed=0)},
        INT8 | {"scales": FILE, "kv_cache": "int8", "max_kl": 0.0},
        INT8 | {"no_calibration": True, "max_perplexity_increase": 2.5},
        INT8 | {"target": "onnx", "no_calibration": True},
        INT8 | {"kv_cache": "int8", "calibration": on(observer="entropy")},
        {"size": "tiny", "precision": "int4", "kv_cache": "int8", "calibration": on(data=FILE)},
        *(W8A8 | {"calibration": on(observer=observer)} for observer in OBSERVERS),
    ],
    ids=lambda values: " ".join(map(str, values)),
)
def test_possible_requests(values: dict[str, Any]) -> None:
    assert BuildRequest(**values).calibrated


def test_what_is_calibrated() -> None:
    assert not BuildRequest(size="tiny").calibrated
    assert BuildRequest(**INT8).calibrated
    assert BuildRequest(**INT8, kv_cache="int8").cache_dtype == "int8"
    assert BuildRequest(**INT8).cache_dtype == "float32"
    assert BuildRequest(**W8A8).cache_dtype == "float16"


def test_how_much_is_calibrated_on() -> None:
    own, file = CalibrationRequest(), CalibrationRequest(data=FILE)
    assert (own.most_samples, own.most_tokens) == (32, 64)
    assert (file.most_samples, file.most_tokens) == (128, 512)
    asked = replace(file, samples=5, length=FEWEST_TOKENS)
    assert (asked.most_samples, asked.most_tokens) == (5, 256)
    config = preset("tiny")
    assert config.context_length == 512
    assert replace(file, length=512).tokens_for(config) == 512
    assert file.tokens_for(replace(config, context_length=100)) == 100  # what nobody asked for is fitted
    with pytest.raises(UsageError, match="--calibration-length 513 is more than gemma-tiny") as refused:
        replace(file, length=513).tokens_for(config)
    assert "at most 512" in refused.value.hint


def test_observers_are_those_there_are() -> None:
    from gemma_export.calibration import observers

    assert observers.OBSERVERS == OBSERVERS


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
