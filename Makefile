# Every target sets up what it needs: a virtual environment in .venv, with the versions of constraints.txt.
# A second run installs nothing.

PYTHON ?= python3
# Workers of the tests: a number, or auto for one a core.
JOBS ?= auto
# Passed on to the command of `make tour`, `make test`, `make bench`: make test ARGS="-k anderson"
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
BENCH_INSTALLED := $(VENV)/.installed-bench
# Peers on JAX live apart: no version of theirs is to decide one of ours.
JAX_VENV := .venv-jax
JAX_INSTALLED := $(JAX_VENV)/.installed
# The build backend is pinned and installed beforehand, so that no build fetches another one.
PIP_INSTALL := $(BIN)/python -m pip install --progress-bar off --disable-pip-version-check --no-input -c constraints.txt
EDITABLE := --no-build-isolation --editable
LOG := $(VENV)/install.log
PYTEST = OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest -n $(JOBS) --dist worksteal
# What make of before version 4, as on a Mac, does not know.
SYNCED := $(if $(filter output-sync,$(.FEATURES)),--output-sync)
SAY_FAILED := tail -n 15 $(LOG) >&2; echo "==> Installing failed. All that pip said is in $(LOG)." >&2; exit 1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help tour test test-slow lint types format bench bench-smoke smoke-families smoke-gpu clean

help:  ## Show this
	@echo "implicitly: implicit layers for PyTorch"
	@echo
	@sed -n 's/^\([a-z-]*\):.*##  *\(.*\)/  make \1|\2/p' Makefile | while IFS='|' read -r name text; do \
		printf '%-20s %s\n' "$$name" "$$text"; done
	@echo
	@echo "Each sets up .venv first where that is not done. Variables: PYTHON=$(PYTHON), JOBS=$(JOBS), ARGS=..."

tour: $(INSTALLED)  ## Train a model, see the memory it saves, check its gradient, watch flows, learn faces (two minutes)
	@$(BIN)/implicitly tour $(ARGS)

test: $(INSTALLED)  ## Run the tests on all cores
	@$(PYTEST) -m "not slow" $(ARGS)

test-slow: $(INSTALLED)  ## Run those tests that take longest: trainings, generated code, more graphs of the compiler
	@$(PYTEST) -m slow $(ARGS)

lint: $(INSTALLED)  ## Check style and format
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

types: $(INSTALLED)  ## Check types
	@$(BIN)/pyright

format: $(INSTALLED)  ## Format, and fix what can be fixed
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: $(BENCH_INSTALLED) $(JAX_INSTALLED)  ## Measure side by side with peers (some minutes; ARGS=--write-tables keeps the tables)
	@$(BIN)/python -m benchmarks $(ARGS)

bench-smoke: $(BENCH_INSTALLED)  ## Run every benchmark briefly; its numbers mean nothing
	@$(MAKE) --no-print-directory --jobs=2 $(SYNCED) smoke-families smoke-gpu

smoke-families: $(BENCH_INSTALLED)
	@$(BIN)/python -m benchmarks --smoke $(ARGS)

smoke-gpu: $(BENCH_INSTALLED)
	@$(BIN)/python -m benchmarks.gpu --device cpu --smoke

clean:  ## Remove .venv, caches and builds (runs/ stays)
	rm -rf $(VENV) $(JAX_VENV) build dist .pytest_cache .ruff_cache .hypothesis
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# --- Setting up -------------------------------------------------------------------------------------------

$(INSTALLED): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { \
		echo "There is no $(PYTHON) here. Install Python 3.11 or newer, or name one: make PYTHON=python3.12 ..." >&2; \
		exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "Python 3.11 or newer is needed, and $(PYTHON) is $$($(PYTHON) -V 2>&1)." \
			"Name a newer one: make PYTHON=python3.12 ..." >&2; \
		exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { \
		echo "==> Making $(VENV) with $$($(PYTHON) -V)"; \
		rm -rf $(VENV); \
		$(PYTHON) -m venv $(VENV) >/dev/null 2>&1 || { \
			rm -rf $(VENV); \
			$(PYTHON) -m venv --without-pip $(VENV) && \
			$(PYTHON) -m pip --python $(BIN)/python install --quiet --disable-pip-version-check pip; }; } || { \
		echo "Making $(VENV) failed. $(PYTHON) needs its venv and pip modules (Debian: python3-venv)." >&2; \
		exit 1; }
	@echo "==> Installing implicitly and what it needs into $(VENV) (some minutes, once)"
	@{ $(PIP_INSTALL) hatchling editables && $(PIP_INSTALL) $(EDITABLE) '.[recipes,viz,convex,dev]'; } >$(LOG) 2>&1 || { \
		$(SAY_FAILED); }
	@touch $@

$(BENCH_INSTALLED): $(INSTALLED)
	@echo "==> Installing the peers to compare with into $(VENV)"
	@# qpth asks for NumPy 1, but runs with 2; it has to be built. torchode needs torchtyping, which asks for an
	@# older typeguard than there is here, but runs with this one.
	@{ $(PIP_INSTALL) $(EDITABLE) '.[bench]' && $(PIP_INSTALL) setuptools && \
		$(PIP_INSTALL) --no-build-isolation --no-deps qpth torchode torchtyping; } >$(LOG) 2>&1 || { \
		$(SAY_FAILED); }
	@touch $@

$(JAX_INSTALLED): $(INSTALLED) benchmarks/jax-requirements.txt
	@echo "==> Installing the peers on JAX into $(JAX_VENV)"
	@rm -rf $(JAX_VENV)
	@{ $(PYTHON) -m venv --without-pip $(JAX_VENV) && \
		$(BIN)/python -m pip --python $(JAX_VENV)/bin/python install --progress-bar off --disable-pip-version-check \
			--no-input -r benchmarks/jax-requirements.txt; } >$(LOG) 2>&1 || { $(SAY_FAILED); }
	@touch $@
