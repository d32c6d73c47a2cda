# `make demo` and `make test` need only python3, make and PyPI.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
export TOKENIZERS_PARALLELISM = false

.PHONY: demo frontier masked-diffusion test test-long compile-matrix check-install test-versions kill lint format bench conformance gpu sanitize clean

# constraints.txt pins the versions that the tests pass with; torch comes first, so that a build that is there is kept.
$(VENV)/.installed: pyproject.toml constraints.txt setup.py $(wildcard csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

demo: $(VENV)/.installed
	$(BIN)/dpo demo

# Five methods against the closed-form optimum, in exact reward and divergence: examples/frontier.
frontier: $(VENV)/.installed
	$(BIN)/python -m examples.frontier $(FRONTIER_ARGS)

# A masked-diffusion model learns a preference: examples/masked_diffusion.
masked-diffusion: $(VENV)/.installed
	$(BIN)/python -m examples.masked_diffusion

test: $(VENV)/.installed
	$(BIN)/python -m pytest -n auto --dist loadscope $(PYTEST_ARGS)

# The tests that take minutes, and the property tests with twenty times as many examples.
test-long: $(VENV)/.installed
	$(BIN)/python -m pytest -n auto --dist loadscope --slow -m "slow or property" $(PYTEST_ARGS)

# Resolves every extra and constraints.txt on plain PyPI, in dry run, whatever this machine's pip is set to.
check-install: $(VENV)/.installed
	$(BIN)/python -m tests.install

# The suite on the oldest, pinned and newest versions, 7 GB each in .venvs/; writes docs/versions.md.
# VERSIONS_ARGS="newest" runs one set.
test-versions: $(VENV)/.installed
	$(BIN)/python -m tests.install.versions $(VERSIONS_ARGS)

# Every kernel and option on every chip by every Triton that a supported torch brings: hours of a processor.
TRITONS ?= 3.6.0 3.7.1 3.8.0 3.9.0
compile-matrix: $(VENV)/.installed
	for version in $(TRITONS); do \
		test -d .tritons/$$version || $(BIN)/python -m pip install --quiet --no-deps --target .tritons/$$version triton==$$version || exit 1; \
		PYTHONPATH=.tritons/$$version $(BIN)/python -m pytest -n auto --slow tests/dpo_kernels/kernels/test_compile.py $(PYTEST_ARGS) || exit 1; \
	done

# A hundred runs, killed at random moments and resumed; KILL_ARGS="--seed 7" repeats one.
kill: $(VENV)/.installed
	$(BIN)/python -m tests.engine.kills.harness --runs 100 $(KILL_ARGS)

# The native library's tests under the address and undefined-behaviour sanitizers of g++. Python allocates at its end what
# it never frees, so leaks are not looked for.
SANITIZED := build/sanitized/libdpo_native.so
sanitize: $(VENV)/.installed
	$(BIN)/python csrc/build_native.py --sanitize --output $(SANITIZED)
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
		ASAN_OPTIONS=detect_leaks=0 DPO_NATIVE_LIBRARY=$(SANITIZED) \
		$(BIN)/python -m pytest tests/dpo_kernels/test_native*.py tests/engine/model/test_native*.py $(PYTEST_ARGS)

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev,bench]"
	$(BIN)/python -m pytest benchmarks $(PYTEST_ARGS)

# Tries every causal-LM family of transformers on packs and rewrites docs/conformance.md;
# CONFORMANCE_ARGS="llama qwen3" tries these alone and writes nothing.
conformance: $(VENV)/.installed
	$(BIN)/python -m tests.conformance $(CONFORMANCE_ARGS)

# Runs on a CUDA machine with the system's torch, triton and transformers; nothing is installed.
# GPU_ARGS="--out DIR --seconds 300 --sections cuda,head" narrows it; a further run replaces what it runs.
gpu:
	$(PYTHON) -m benchmarks.gpu $(GPU_ARGS)

clean:
	rm -rf $(VENV) .venvs build dist *.egg-info dpo_kernels/*.so
