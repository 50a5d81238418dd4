# Everything that CI runs, one command here runs. `demo`, `test` and `dev` need Python 3.11 and a C++20 compiler.
PYTHON ?= python3
DEV := .venv/bin
NEW := .venv-test/bin
PROMPT ?= Why is the sky blue?
MEMORY ?= 90MB

.PHONY: help demo test dev check lint fuzz test-arm test-wasm test-host compare clean

help:
	@echo "make demo   build, fit SmolLM2-135M-Instruct to $(MEMORY), ask it a question; installs no torch"
	@echo "make test   lint, types, import contract and all tests, in a new environment: what CI runs"
	@echo "make dev    editable installation in .venv; again after a change of native/"
	@echo "make check  lint, types, import contract and the fast tests, in .venv"
	@echo "make fuzz   100,000 mutated files per format, native readers under AddressSanitizer, in .venv"
	@echo "make compare   comparisons with other engines, each beside edgewise in one run, into docs/results; BENCH='llm'"
	@echo "make test-arm, test-wasm, test-host   kernels of every instruction tier against the reference, in C++:"
	@echo "            cross-compiled under qemu-aarch64, in wasmtime, and on this machine"

SOURCES := pyproject.toml CMakeLists.txt $(shell find src native -type f ! -name '*.so' ! -name '*.pyc')

demo: .venv/installed
	rm -rf build/demo
	mkdir -p build/demo
	$(DEV)/edgewise fit smollm2 --memory $(MEMORY) --out build/demo/smollm2
	$(DEV)/edgewise run build/demo/smollm2 "$(PROMPT)" --max-tokens 160 --repetition-penalty 1.1

.venv/installed: $(SOURCES)
	@test -x $(DEV)/python || $(PYTHON) -m venv .venv
	$(DEV)/python -m pip install --quiet .
	@touch $@

test:
	rm -rf .venv-test
	$(PYTHON) -m venv .venv-test
	$(NEW)/python -m pip install --quiet -c constraints.txt '.[dev]'
	$(MAKE) --no-print-directory lint BIN=$(NEW)
	$(NEW)/python -m pytest -n 2 -m "slow or not slow"

dev:
	@test -x $(DEV)/python || $(PYTHON) -m venv .venv
	$(DEV)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch .venv/installed

check:
	@test -x $(DEV)/pytest || { echo "make check runs in .venv, which lacks pytest: run 'make dev' first" >&2; exit 2; }
	$(MAKE) --no-print-directory lint BIN=$(DEV)
	$(DEV)/python -m pytest -n 2

BIN ?= $(DEV)
lint:
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The instrumented core goes into a copy of the package; the interpreter itself is not instrumented, so its runtime
# library has to be loaded first, and with it the C++ one whose exceptions it intercepts. Leaks of the interpreter are
# not ours.
fuzz:
	$(DEV)/python -m pip install --quiet --no-deps --upgrade --target build/asan/site \
		--config-settings cmake.define.EDGEWISE_ASAN=ON --config-settings build-dir=build/asan/native .
	PYTHONPATH=build/asan/site ASAN_OPTIONS=detect_leaks=0 \
		LD_PRELOAD="$$($${CXX:-g++} -print-file-name=libasan.so) $$($${CXX:-g++} -print-file-name=libstdc++.so)" \
		$(DEV)/python tests/fuzz/run.py

# Peers are built from their source packages on the machine that compares them. BENCH: which comparisons.
BENCH ?= interchange start llm
compare: .venv-compare/installed .venv-peer/installed
	for name in $(BENCH); do \
		.venv-compare/bin/python benchmarks/$$name.py --peer-python .venv-peer/bin/python \
			--out docs/results/$$name$$(test $$name = llm || echo .json) || exit 1; done

.venv-compare/installed: $(SOURCES)
	@test -x .venv-compare/bin/python || $(PYTHON) -m venv .venv-compare
	.venv-compare/bin/python -m pip install --quiet -c constraints.txt '.[dev,encoders]'
	@touch $@

.venv-peer/installed:
	$(PYTHON) -m venv .venv-peer
	.venv-peer/bin/python -m pip install --quiet --no-binary llama-cpp-python llama-cpp-python
	@touch $@

# The tools come as wheels; qemu-aarch64, and the second compiler for Arm, from the system's packages, if there.
TOOLS := build/kernels/tools/bin
test-arm test-wasm test-host: test-%:
	@test -x $(TOOLS)/python || $(PYTHON) -m venv build/kernels/tools
	$(TOOLS)/python -m pip install --quiet cmake ninja ziglang wasmtime
	$(TOOLS)/python native/tests/run.py $*

clean:
	rm -rf build .venv-test .venv-compare .venv-peer .pytest_cache .mypy_cache .ruff_cache .hypothesis
