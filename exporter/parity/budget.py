"""What the parity gate judges a bundle by: its precision's budget, and what the build asked for instead."""

from dataclasses import replace

from gemma_export.exporter.request import BuildRequest
from gemma_export.runtime.manifest import Manifest
from gemma_export.runtime.parity import BUDGETS, Budget

QUANTIZED_RANDOM = Budget(
    max_relative_error=0.5,
    mean_kl=2.0,
    max_kl=10.0,
    top1_agreement=0.0,
    perplexity_change=1.0,
    reason="Random weights have no favourite token: of 256,000 logits some are always nearly equal, and "
    "rounding weights without structure costs more than rounding a model's. A wrong graph is far outside.",
)
"""What the gate allows quantized random weights, which are there to try a size."""


def requested_budget(request: BuildRequest) -> Budget:
    """The budget of a build: the precision's, with the bounds that were asked for in place of its own."""
    budget = BUDGETS[request.precision]
    if request.random_weights and request.scheme.products is not None:
        budget = QUANTIZED_RANDOM
    asked = []
    if request.max_kl is not None:
        budget = replace(budget, mean_kl=request.max_kl)
        asked.append(f"a mean KL of at most {request.max_kl:g}")
    if request.max_perplexity_increase is not None:
        budget = replace(budget, perplexity_change=request.max_perplexity_increase / 100)
        asked.append(f"a perplexity within {request.max_perplexity_increase:g} %")
    if asked:
        budget = replace(budget, reason=f"{budget.reason} The build asked for {' and '.join(asked)}.")
    return budget


def budget_of(manifest: Manifest) -> Budget:
    """The budget that a bundle was judged by when it was built: what it is judged by ever after."""
    return BUDGETS[manifest.precision] if manifest.budget is None else manifest.budget
