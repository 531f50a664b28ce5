# Each target sets up .venv first, if it is missing or out of date. It needs python3 (3.11 or later), make and g++.
# Another interpreter: make test PYTHON=python3.12.   More arguments for the command behind a target: make demo ARGS=--help.
# torch without CUDA (megabytes, not gigabytes): make test PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# For torch builds that bring no Triton (the CPU wheels): the interpreter tests of the GPU kernels want one. A CUDA build of
# torch brings the Triton it was made for and keeps it.
TRITON := triton==3.9.0; platform_system == 'Linux'

.DEFAULT_GOAL := help
.PHONY: help demo test test-plain lint format clean

help: ## show this list
	@sed -n 's/^\([a-z-]*\): .*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 14

demo: $(INSTALLED) ## train a small network with every loss, print the table, draw the curves (under two minutes)
	$(BIN)/python -m bench.train $(ARGS)

test: $(INSTALLED) ## run the tests, without the slow ones (all: ARGS="-m ''")
	$(BIN)/python -m pytest $(ARGS)

test-plain: $(INSTALLED) ## the same without the C++ extension: a copy of the tracked files, which hold none
	rm -rf out/plain && mkdir -p out/plain && git ls-files -z | xargs -0 cp --parents -t out/plain
	cd out/plain && ../../$(BIN)/python -m pytest $(ARGS)

lint: $(INSTALLED) ## check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(INSTALLED) ## sort the imports and format the code
	$(BIN)/ruff check --select I --fix .
	$(BIN)/ruff format .

clean: ## remove the environment and everything built
	rm -rf $(VENV) build dist out *.egg-info fused_losses/*.so .pytest_cache .ruff_cache .hypothesis

$(INSTALLED): constraints.txt pyproject.toml setup.py Makefile $(wildcard csrc/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -r constraints.txt
	$(BIN)/python -m pip show --quiet triton 2>/dev/null || $(BIN)/python -m pip install "$(TRITON)"
	FUSED_LOSSES_BUILD_EXT=1 $(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	$(BIN)/python -m pip check
	@touch $@
