# Each command sets up .venv by itself, once. Another Python: make test PYTHON=python3.12
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# They train for hours, and continue where they were stopped.
EXPERIMENTS := $(addprefix benchmarks/,$(addsuffix .py,scaling_law moonlight_ladder \
  compute_optimal lr_transfer update_rms weight_decay variants finetune_table))
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check

.PHONY: help train test lint docs archives bench
.DEFAULT_GOAL := help

help:
	@echo "make train   train a small language model with Muon, on this machine"
	@echo "make test    every test, docstring example and notebook"
	@echo "make lint    ruff, mypy, and zizmor for the workflows"
	@echo "make docs    the documentation site, in site/"
	@echo "make archives  wheel and sdist, checked, in dist/"
	@echo "make bench   the scripts of benchmarks/, one after the other"

train: $(VENV)/.train
	@$(BIN)/optax-muon train

test: $(VENV)/.dev
	@$(BIN)/python -m pytest

lint: $(VENV)/.dev
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/zizmor --quiet --offline --pedantic .

docs: $(VENV)/.docs
	@$(BIN)/python docs/build.py

archives: $(VENV)/.release
	@rm -rf dist
	@$(BIN)/python -m hatchling build --directory dist
	@$(BIN)/twine check --strict dist/*
	@$(BIN)/check-wheel-contents dist/*.whl

bench: $(VENV)/.dev
	@set -e; for script in $(filter-out $(EXPERIMENTS),$(wildcard benchmarks/[!_]*.py)); do \
	  echo "== $$script"; $(BIN)/python "$$script"; \
	done

# What the command `optax-muon` needs, and no more.
$(VENV)/.train: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "optax-muon needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>&1)." \
	    "Name another one: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	@echo "Setting up $(VENV): jax, optax, flax, orbax. Once, a minute or two."
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) --editable '.[train]'
	@touch $@

# The tools of the tests and the packages that results are compared with. On Linux the default wheel
# of torch brings gigabytes of CUDA: without a GPU, name PyTorch's index of CPU wheels in
# PIP_EXTRA_INDEX_URL, and its wheel takes precedence.
$(VENV)/.dev: $(VENV)/.train
	@echo "Adding to $(VENV) what the tests need: pytest, torch, transformers. Once, a few minutes."
	@$(PIP) --editable '.[train,peers,dev]'
	@touch $@

# What builds and checks the archives.
$(VENV)/.release: $(VENV)/.train
	@$(PIP) --editable '.[release]'
	@touch $@

# What builds the documentation.
$(VENV)/.docs: $(VENV)/.train
	@$(PIP) --editable '.[docs]'
	@touch $@
