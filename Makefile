# `make demo` and `make test` work on a fresh machine; all others build on the same environment.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: help setup demo test test-full test-chaos test-gpu check format docs clean

help: ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(STAMP) ## make the virtual environment and install everything

# Runs again only when what is installed would change.
$(STAMP): pyproject.toml setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python 3.11 or newer is needed; name it with PYTHON=..."; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]' --constraint constraints.txt
	@touch $@

demo: $(STAMP) ## compress a small encoder on movie reviews, with two workers
	$(BIN)/moe-dist compress pipelines/recipes/demo.yaml

# Tests that start workers of their own have the machine to themselves; the others run in pairs.
SPREAD := ray or distributed or hosts or chaos

test: $(STAMP) ## all tests but the slow ones
	$(BIN)/python -m pytest -q -n 2 --dist loadfile -m "not slow and not ($(SPREAD))" --durations=20
	$(BIN)/python -m pytest -q -m "not slow and ($(SPREAD))" --durations=20

test-full: $(STAMP) ## all tests
	$(BIN)/python -m pytest -q

test-chaos: $(STAMP) ## hurt runs in a dozen ways, 40 times; all kinds only as root
	$(BIN)/python -m tests.chaos --faults 40 --seed 0

test-gpu: $(STAMP) ## the tests that need a GPU, and a page of its figures; without one nothing
	$(BIN)/python -m pytest -q -rs -m gpu
	$(BIN)/moe-dist benchmark gpu

check: $(STAMP) ## format, lint, types, import contracts, docstrings
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/pydoclint moe_dist pipelines cluster

format: $(STAMP) ## put the code in form
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(STAMP) ## write docs/configuration.md from the models
	$(BIN)/python -m pipelines.configuration_docs

clean: ## remove what was built, but no results
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
