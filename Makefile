# Everything that CI runs, one command here runs. The first two targets need nothing but Python 3.11, gcc and make.
PYTHON ?= python3
DEV := .venv/bin
NEW := .venv-test/bin
PROMPT ?= What is the capital of France?
MEMORY ?= 90MB

.PHONY: help demo test check lint dev native fuzz clean

help:
	@echo "make demo    build, fit SmolLM2-135M-Instruct to $(MEMORY), ask it a question (no torch)"
	@echo "make test    lint, types, import contract and all tests, in a new environment (what CI runs)"
	@echo "make dev     an editable installation in .venv, for working on edgewise"
	@echo "make check   lint, types, import contract and the fast tests, in .venv (under a minute)"
	@echo "make native  rebuild the native core into src/, for make check"
	@echo "make fuzz    100,000 mutated files per format, native readers under AddressSanitizer"

demo:
	test -x $(DEV)/edgewise || { $(PYTHON) -m venv .venv && $(DEV)/pip install --quiet .; }
	rm -rf build/demo && mkdir -p build/demo
	$(DEV)/edgewise fit smollm2 --memory $(MEMORY) --out build/demo/smollm2
	$(DEV)/edgewise run build/demo/smollm2 "$(PROMPT)"

# Wheels may be old or missing for a new interpreter: the constraints hold what has to be held, pip does the rest.
test:
	rm -rf .venv-test
	$(PYTHON) -m venv .venv-test
	$(NEW)/pip install --quiet -c constraints.txt '.[dev]'
	$(MAKE) --no-print-directory lint BIN=$(NEW)
	$(NEW)/python -m pytest -n 2 -m "slow or not slow"

dev:
	test -x $(DEV)/python || $(PYTHON) -m venv .venv
	$(DEV)/pip install --quiet -c constraints.txt -e '.[dev]'
	$(MAKE) --no-print-directory native

check:
	@test -x $(DEV)/pytest || { echo "make check needs the development environment: run 'make dev' first"; exit 2; }
	$(MAKE) --no-print-directory lint BIN=$(DEV)
	$(DEV)/python -m pytest -n 2

BIN ?= $(DEV)
lint:
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

native:
	PATH="$(abspath $(DEV)):$$PATH" $(PYTHON) tools/native.py build/dev
