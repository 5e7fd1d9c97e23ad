# What a person types. Each target first makes the environment it needs: .venv, once per pyproject.toml and kernels.
#
#   make demo PYTHON=/usr/bin/python3.12     makes .venv with that Python
#   make demo VENV=/elsewhere/venv           keeps the environment elsewhere

VENV ?= .venv
BUNDLE ?= bundles/tiny
PYTEST ?=
WORKERS ?= 2

bin := $(VENV)/bin
python := $(bin)/python
ready = @sh .ci/environment "$(VENV)"

.DEFAULT_GOAL := help
.PHONY: help demo test lint wheel clean environment

help: ## Show what can be made
	@echo "make TARGET, where TARGET is one of:"
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  \1|\2/p' Makefile | while IFS='|' read -r name what; do \
		printf '%-14s%s\n' "$$name" "$$what"; done

environment: ## Make or update .venv with everything (the others do it by themselves)
	$(ready)

demo: environment ## Build the model that ships, check it, and let it write
	@sh .ci/demo "$(bin)" "$(BUNDLE)"

test: environment ## Run the tests in WORKERS=2 processes; PYTEST="-k name" passes options on
	@# One thread each: the threads of two processes would spin against each other.
	OMP_NUM_THREADS=1 $(python) -m pytest -m "not gpu" --numprocesses $(WORKERS) --dist loadfile $(PYTEST)

lint: environment wheel ## Check style, the imports between rooms, and the types of the built wheel
	$(python) -m ruff check
	$(python) -m ruff format --check
	@# The editable install maps its rooms by an import hook, which none of these can follow: they read the wheel.
	rm -rf build/installed
	$(python) -m pip install --quiet --no-deps --target build/installed dist/*.whl
	PYTHONPATH=build/installed $(python) -c "from importlinter.cli import lint_imports_command as run; run()"
	MYPYPATH=build/installed $(python) -m mypy -p gemma_export
	MYPYPATH=build/installed:benchmarks $(python) -m mypy benchmarks

wheel: environment ## Build dist/gemma_export-VERSION-....whl
	@# What an older build left in build/lib would go into the wheel.
	rm -rf build dist
	$(python) -m build --wheel --no-isolation --outdir dist . > /dev/null
	@ls dist/*.whl

clean: ## Remove what was made here: .venv, the bundles, caches
	rm -rf "$(VENV)" build dist bundles gemma_export.egg-info
	rm -rf .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +
