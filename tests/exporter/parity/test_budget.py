"""What a bundle is judged by: the bounds that its build had, which its manifest keeps."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from support.small_bundle import Shape, manifest

from gemma_export.exporter.events import ignore
from gemma_export.exporter.parity.budget import QUANTIZED_RANDOM, budget_of, requested_budget
from gemma_export.exporter.parity.measure import measure_bundle
from gemma_export.exporter.request import BuildRequest
from gemma_export.runtime.manifest import MANIFEST_NAME, Manifest
from gemma_export.runtime.parity import BUDGETS


def read(**changes: object) -> Manifest:
    return Manifest.from_json(json.dumps({**manifest(Shape()), "files": {}, **changes}))


@pytest.mark.parametrize("precision", BUDGETS)
def test_a_build_is_judged_by_its_precision(precision: str) -> None:
    assert requested_budget(BuildRequest(size="tiny", precision=precision)) == BUDGETS[precision]


def test_bounds_that_were_asked_for_take_the_place_of_the_precisions() -> None:
    request = BuildRequest(size="tiny", precision="int8", max_kl=0.02, max_perplexity_increase=0.5)
    found = requested_budget(request)
    assert (found.mean_kl, found.perplexity_change) == (0.02, 0.005)
    assert found.reason.startswith(BUDGETS["int8"].reason)
    assert found.reason.endswith("asked for a mean KL of at most 0.02 and a perplexity within 0.5 %.")
    same = replace(found, mean_kl=5e-3, perplexity_change=1e-2, reason=BUDGETS["int8"].reason)
    assert same == BUDGETS["int8"]


@pytest.mark.parametrize(("precision", "quantized"), [("int8", True), ("int4", True), ("bf16", False)])
def test_random_weights_have_a_budget_of_their_own_where_they_are_quantized(
    precision: str, quantized: bool
) -> None:
    request = BuildRequest(size="2b", random_weights=True, precision=precision)
    assert requested_budget(request) == (QUANTIZED_RANDOM if quantized else BUDGETS[precision])


def test_a_bundle_keeps_the_budget_of_its_build() -> None:
    asked = requested_budget(BuildRequest(size="tiny", precision="int4", max_kl=0.3))
    kept = replace(read(precision="int4"), budget=asked)
    assert budget_of(Manifest.from_json(kept.to_json())) == asked


def test_a_manifest_without_a_budget_means_its_precisions() -> None:
    assert budget_of(read(precision="int8")) == BUDGETS["int8"]


def test_the_command_judges_as_the_build_did(bundle_copy: Path) -> None:
    opened = Manifest.from_json((bundle_copy / MANIFEST_NAME).read_text())
    assert opened.budget == BUDGETS["fp32"]
    strict = replace(BUDGETS["fp32"], mean_kl=0.0, reason="The build asked for the impossible.")
    (bundle_copy / MANIFEST_NAME).write_text(replace(opened, budget=strict).to_json())
    report = measure_bundle(
        bundle_copy, checkpoint=None, reference="eager", text=None, level="quick", listener=ignore
    )
    assert (report.budget.mean_kl, report.budget.reason) == (0.0, strict.reason)
    assert report.verdict == "fail"
    assert all("mean KL" in reason for reason in report.reasons)
