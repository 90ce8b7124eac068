# The two commands are `make demo` and `make test`; both set up .venv when it is missing.
PYTHON ?= python3
# Processes of the tests; each uses one thread unless a test is about threads.
JOBS ?= 2
BIN := .venv/bin
export TORCH

.DEFAULT_GOAL := help
.PHONY: help venv demo test slow check wheel clean

help:
	@echo "make demo   generate text with a 2-bit cache (TORCH=<requirement or wheel>, ARGS=...)"
	@echo "make test   run the fast tests (JOBS=2 processes, ARGS=... for pytest)"
	@echo "make slow   run the slow tests"
	@echo "make check  ruff and mypy"
	@echo "make wheel  build dist/"
	@echo "make clean  remove .venv and build outputs"

venv:
	@$(PYTHON) tools/setup_venv.py

demo: venv
	@$(BIN)/kivi-tvm demo $(ARGS)

test: venv
	@$(BIN)/pytest -m "not slow" -n $(JOBS) --dist worksteal $(ARGS)

slow: venv
	@$(BIN)/pytest -m slow $(ARGS)

check: venv
	@$(BIN)/ruff check && $(BIN)/ruff format --check && $(BIN)/mypy

wheel: venv
	@$(BIN)/python -m build --no-isolation

clean:
	rm -rf .venv .cache build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
