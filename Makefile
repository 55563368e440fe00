# Every target sets up what it needs. PYTHON: the interpreter for the virtual environment, 3.11 or newer.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
DEST ?= demo
# one thread per process: results do not depend on the machine's core count, and workers do not fight over cores
export OMP_NUM_THREADS = 1

.PHONY: venv test lint demo bench clean

venv: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml deploy/constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c deploy/constraints.txt -e '.[test,lint]'
	touch $@

# the S3 server of the tests has needs of its own, so it has an environment of its own
.venv-swift/.ready: tests/swift_node.py
	$(PYTHON) -m venv .venv-swift
	.venv-swift/bin/pip install --quiet --disable-pip-version-check swift==2.38.3
	touch $@

test: venv .venv-swift/.ready
	$(BIN)/python -m pytest

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# a grid merged on this machine's CPU; the catalog is left in $(DEST)
demo: venv
	$(BIN)/ziplora run manifests/demo.yaml --output $(DEST)

bench: venv
	$(BIN)/python -m tests.bench.true_size

clean:
	rm -rf $(VENV) .venv-swift .pytest_cache .mypy_cache .ruff_cache
