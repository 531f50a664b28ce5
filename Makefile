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
.PHONY: help demo examples vision-examples test test-suite test-gpu test-emulator gpu-proof test-plain test-torch sanitized test-sanitized fuzz-sanitized machine-code bench docs lint format clean

help: ## show this list
	@sed -n 's/^\([a-z-]*\): .*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 14

demo: $(INSTALLED) ## train a small network with every loss, print the table, draw the curves (under two minutes)
	$(BIN)/python -m bench.evidence.train $(ARGS)

# On top of .venv, whose torch it uses.
EXAMPLES := out/examples
examples: $(INSTALLED) ## run the files of examples/, with transformers, accelerate and lightning (all but timm's and torchreid's)
	test -x $(EXAMPLES)/bin/python || $(BIN)/python -m venv $(EXAMPLES)
	SITE='import sysconfig; print(sysconfig.get_path("purelib"))'; echo "import site; site.addsitedir('$$($(BIN)/python -c "$$SITE")')" \
		> "$$($(EXAMPLES)/bin/python -c "$$SITE")/on_top.pth"
	$(EXAMPLES)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -c examples/constraints.txt \
		"fused_losses[examples]"
	$(EXAMPLES)/bin/python -m pytest tests/test_examples.py -m "examples and not torchvision" $(ARGS)

# torchvision works beside the torch that it was built for, and beside no other: these have both to themselves.
VISION := out/vision-examples
vision-examples: $(INSTALLED) ## run timm's and torchreid's (gigabytes where torch comes with CUDA)
	test -x $(VISION)/bin/python || $(PYTHON) -m venv $(VISION)
	$(VISION)/bin/python -m pip install --quiet --disable-pip-version-check -c examples/constraints.txt torch torchvision setuptools
	FUSED_LOSSES_BUILD_EXT=0 $(VISION)/bin/python -m pip install --quiet --disable-pip-version-check --no-build-isolation \
		-c examples/constraints.txt --editable ".[test,vision-examples]"  # the extension is there: one serves every torch
	$(VISION)/bin/python -m pytest tests/test_examples.py -m torchvision $(ARGS)

test: test-suite test-gpu test-emulator ## run the tests, without the slow ones (all: ARGS="-m ''")

test-suite: $(INSTALLED)
	$(BIN)/python -m pytest $(ARGS)

test-gpu: $(INSTALLED) ## of these, the GPU kernels alone, in Triton's interpreter
	$(BIN)/python -m pytest tests/gpu $(ARGS)

test-emulator: $(INSTALLED) ## and as compiled, on an emulator
	$(BIN)/python -m pytest tests/emulator $(ARGS)

gpu-proof: $(INSTALLED) ## run the GPU kernels as compiled, on an emulator: every case, every target, 2,000 random ones (an hour)
	$(BIN)/python -m pytest tests/emulator -m "" $(ARGS)

machine-code: $(INSTALLED) ## compile every GPU kernel for every target, without a GPU: registers, spills, widths, instructions
	$(BIN)/python -m bench.speed.machine_code --gates $(ARGS)

test-plain: $(INSTALLED) ## those of the package without the C++ extension: a copy of the tracked files, which hold none
	rm -rf out/plain && mkdir -p out/plain && git ls-files -z | xargs -0 cp --parents -t out/plain
	cd out/plain && ../../$(BIN)/python -m pytest --ignore=tests/bench $(addprefix --ignore=tests/test_,examples.py documentation.py packaging.py typing.py) $(ARGS)

# What pyproject.toml promises, with what pip makes of it: the oldest torch, or another, under any Python; and a build of
# the C++ extension against that torch.
TORCH ?= 2.10.*
ELSEWHERE := out/torch-$(subst *,x,$(TORCH))-$(notdir $(PYTHON))
test-torch: ## the tests with another torch and Python: make test-torch TORCH=2.10.* PYTHON=python3.10
	rm -rf $(ELSEWHERE)/src && mkdir -p $(ELSEWHERE)/src && git ls-files -z | xargs -0 cp --parents -t $(ELSEWHERE)/src
	test -x $(ELSEWHERE)/bin/python || $(PYTHON) -m venv $(ELSEWHERE)
	cd $(ELSEWHERE)/src && ../bin/python -m pip install --disable-pip-version-check "torch==$(TORCH)" "setuptools>=77" && \
		FUSED_LOSSES_BUILD_EXT=1 ../bin/python -m pip install --disable-pip-version-check --no-build-isolation \
		--editable ".[test,bench]"
	cd $(ELSEWHERE)/src && ../bin/python -m pytest --ignore=tests/bench --ignore=tests/test_documentation.py $(ARGS)  # they promise Python 3.11 only
	cd $(ELSEWHERE)/src && ../bin/python -m pytest tests/gpu $(ARGS)

# -O1: with sanitizers, -O3 takes the compiler ten times as long
SANITIZE := -fsanitize=address,undefined -fno-sanitize-recover=undefined
SANITIZED := cd out/sanitized && LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so.6)" \
	ASAN_OPTIONS=detect_leaks=0:quarantine_size_mb=16 UBSAN_OPTIONS=print_stacktrace=1 ../../$(BIN)/python -m pytest
sanitized: $(INSTALLED)
	rm -rf out/sanitized && mkdir -p out/sanitized && git ls-files -z | xargs -0 cp --parents -t out/sanitized
	cd out/sanitized && FUSED_LOSSES_CXXFLAGS="$(SANITIZE) -fno-omit-frame-pointer -g1 -O1" LDFLAGS="$(SANITIZE)" FUSED_LOSSES_BUILD_EXT=1 \
		../../$(BIN)/python setup.py -q build_ext --inplace

test-sanitized: sanitized ## the tests that reach C++, on a build with AddressSanitizer and UndefinedBehaviorSanitizer
	$(SANITIZED) tests/losses/test_cpu.py tests/losses/test_reference.py tests/losses/test_selection.py tests/losses/test_edges.py tests/losses/test_fuzz_ops.py \
		--deselect tests/losses/test_cpu.py::test_calls_do_not_leak $(ARGS)  # it counts pages, and the sanitizer's own come in between

fuzz-sanitized: sanitized ## 20,000 random arguments of the raw ops on that build
	$(SANITIZED) tests/losses/test_fuzz_ops.py -m slow $(ARGS)

bench: $(INSTALLED) ## time every loss against plain PyTorch (pytest-benchmark), write out/bench.json, draw out/bench.png
	mkdir -p out
	MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=8000000000 $(BIN)/python -m pytest bench/speed --benchmark-json=out/bench.json \
		--benchmark-group-by=group --benchmark-columns=median,iqr,rounds --benchmark-sort=name -q $(ARGS)
	$(BIN)/python -m bench.speed.chart out/bench.json out/bench.png

docs: $(INSTALLED) ## build the site of docs/, out/docs/index.html
	$(BIN)/python -m sphinx -E -W --keep-going -q -b html docs out/docs $(ARGS)
	@echo out/docs/index.html

lint: $(INSTALLED) ## check style, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror csrc/*.cpp csrc/*.h
	$(BIN)/mypy

format: $(INSTALLED) ## sort the imports and format the code
	$(BIN)/ruff check --select I --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i csrc/*.cpp csrc/*.h

clean: ## remove the environment and everything built
	rm -rf $(VENV) build dist out *.egg-info fused_losses/*.so .pytest_cache .ruff_cache .mypy_cache .hypothesis

$(INSTALLED): constraints.txt pyproject.toml setup.py Makefile $(wildcard csrc/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -r constraints.txt
	$(BIN)/python -m pip show --quiet triton 2>/dev/null || $(BIN)/python -m pip install "$(TRITON)"
	FUSED_LOSSES_BUILD_EXT=1 $(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	$(BIN)/python -m pip check
	@touch $@
