"""The range audit: the largest magnitudes, and which of them fp16 cannot hold."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from gemma_export.calibration.range_audit import FP16_MAX, RangeAudit, RangeReport


def audit(**tensors: list[list[float]]) -> RangeAudit:
    seen = RangeAudit()
    for name, blocks in tensors.items():
        for block in blocks:
            seen(name, np.array(block, np.float32))
    return seen


def test_the_limit_is_that_of_fp16():
    assert np.finfo(np.float16).max == FP16_MAX


def test_keeps_the_largest_magnitude_of_either_sign_over_all_blocks():
    report = audit(a=[[1, -5, 2], [3]], b=[[0.5]]).report()
    assert report.largest == {"a": 5.0, "b": 0.5}
    assert report.elements == 5


def test_names_what_leaves_fp16_with_room_to_spare():
    seen = audit(small=[[32752.0]], near=[[-32753.0]], beyond=[[70000.0]])
    assert seen.leaving() == [("near", 32753.0), ("beyond", 70000.0)]
    assert seen.leaving(headroom=1) == [("beyond", 70000.0)]
    assert seen.leaving(limit=100.0, headroom=1)[0] == ("small", 32752.0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_leaves_and_stays_so(value):
    seen = audit(broken=[[1.0], [value, 2.0], [3.0]], fine=[[1.0]])
    ((name, peak),) = seen.leaving()
    assert name == "broken"
    assert not math.isfinite(peak)


def test_an_empty_tensor_says_nothing():
    seen = audit(empty=[[]])
    assert seen.report() == RangeReport({}, 0)
    assert seen.leaving() == []


@given(arrays(np.float32, (3, 4), elements=st.floats(width=32, allow_nan=False)))
def test_is_the_largest_absolute_value(values):
    seen = RangeAudit()
    seen("x", values)
    assert seen.report().largest["x"] == float(np.abs(values).max())


def test_the_report_does_not_change_with_the_audit():
    seen = audit(a=[[1.0]])
    report = seen.report()
    seen("a", np.array([9.0], np.float32))
    assert report.largest == {"a": 1.0}


def test_survives_json():
    report = audit(a=[[1.5]], b=[[math.nan]], c=[[-math.inf]]).report()
    read = RangeReport.from_json(report.to_json())
    assert read.largest["a"] == 1.5
    assert math.isnan(read.largest["b"])
    assert read.largest["c"] == math.inf
    assert read.elements == 3
    json.dumps(json.loads(report.to_json()), allow_nan=False)
