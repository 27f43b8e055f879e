# Each command sets up .venv by itself, once. Another Python: make test PYTHON=python3.12
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: help train test lint bench
.DEFAULT_GOAL := help

help:
	@echo "make train   train a small language model with Muon, on this machine"
	@echo "make test    every test, docstring example and notebook"
	@echo "make lint    ruff and mypy"
	@echo "make bench   the scripts of benchmarks/, one after the other"

train: $(READY)
	@$(BIN)/optax-muon train

test: $(READY)
	@$(BIN)/python -m pytest

lint: $(READY)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

bench: $(READY)
	@set -e; for script in $(wildcard benchmarks/[!_]*.py); do \
	  echo "== $$script"; $(BIN)/python "$$script"; \
	done

# On Linux the default wheel of torch (the `peers` extra) brings gigabytes of CUDA. Without a GPU, set
# PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu: its CPU wheel then takes precedence.
$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "optax-muon needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>&1)." \
	    "Name another one: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	@echo "Setting up $(VENV): jax, optax, flax and the tools. Once, a few minutes."
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --editable '.[train,peers,dev]'
	@touch $@
