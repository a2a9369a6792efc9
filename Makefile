# make train    set up what is missing, then train the arithmetic example        make train SEED=1 CONFIG=my.yaml GPU=1
# make test     set up what is missing, then the tests                           make test-slow for the long ones
# make check    ruff, pyright, import-linter: what CI runs                       make setup | clean

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:

PYTHON ?= python3
SEED ?= 0
CONFIG ?= examples/arithmetic/config.yaml
# Name of the run, and of its folder in runs/: one per configuration and seed, since nothing is ever overwritten.
NAME ?= $(notdir $(patsubst %/,%,$(dir $(CONFIG))))$(if $(filter config,$(basename $(notdir $(CONFIG)))),,-$(basename $(notdir $(CONFIG))))-seed$(SEED)
# More overrides for `make train`, for instance ARGS="trainer.learning_rate=1e-4".
ARGS ?=
# 1: install the CUDA set. Detected: a driver that answers nvidia-smi.
GPU ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo 1 || echo 0)
# Index of torch's CPU wheels, as PyTorch's installation page names it. Needed only where the configured package index
# offers no CPU build of torch; without it such a machine gets the CUDA build, which works but is gigabytes larger.
TORCH_INDEX ?=

VENV := .venv
BIN := $(VENV)/bin
KIND := $(if $(filter 1,$(GPU)),gpu,cpu)
REQUIREMENTS := requirements/$(if $(filter 1,$(GPU)),gpu.txt,cpu.lock)
# The stamp carries a hash of what was installed: nothing is done twice, and nothing is missed after a pull.
STAMP := $(VENV)/.setup-$(KIND)-$(shell cat $(REQUIREMENTS) pyproject.toml | sha256sum | cut -c1-16)
PIP := $(BIN)/python -m pip --disable-pip-version-check
TORCH_INDEX_FLAG := $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))

# Two threads are far slower than one on the small models of tests and examples.
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: setup train test test-slow check format clean

setup: $(STAMP)

$(STAMP): $(REQUIREMENTS) pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info[:2] >= (3, 11) else "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11 …")'
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { echo "this Python lacks ensurepip (Debian and Ubuntu: apt install python3-venv)" >&2; exit 1; }
	@command -v c++ >/dev/null || command -v g++ >/dev/null || echo "no C++ compiler found: ops fall back to plain torch, and are slower" >&2
	@ls $(VENV)/.setup-* 2>/dev/null | grep -qv -- '-$(KIND)-' && { echo "replacing the environment by one for $(KIND)"; rm -rf $(VENV); } || true
	@echo "setting up $(VENV) for $(KIND) (once; a minute or two, mostly downloads)"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	rm -f $(VENV)/.setup-*
ifeq ($(KIND),cpu)
	$(PIP) install --no-deps $(TORCH_INDEX_FLAG) -r $(REQUIREMENTS)
	@$(BIN)/python -c 'import torch' 2>/dev/null || { \
		echo "The package index gave a CUDA build of torch. Installing the CUDA libraries it needs, too;"; \
		echo "to spare them: make clean setup TORCH_INDEX=<the index of CPU wheels named on PyTorch's installation page>"; \
		$(PIP) install "$$(grep '^torch==' $(REQUIREMENTS))"; }
else
	$(PIP) install -r $(REQUIREMENTS)
endif
	$(PIP) install --no-deps --no-build-isolation --editable .
	@$(BIN)/python -c 'import torch, deepspeed, transformers, zmq, msgspec, math_verify; print("torch", torch.__version__)' 2>&1 | tail -n 1
	@touch $@

DATA := examples/arithmetic/data

$(DATA)/heldout.jsonl: examples/arithmetic/problems.py | $(STAMP)
	$(BIN)/python examples/arithmetic/problems.py --out $(DATA)

train: $(STAMP) $(DATA)/heldout.jsonl
	$(BIN)/igrpo train $(CONFIG) run.name=$(NAME) run.seed=$(SEED) $(ARGS)

test: $(STAMP)
	$(BIN)/python -m pytest -m "not slow" --durations=15

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow --durations=15

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Leaves runs/ alone: they are yours.
clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
