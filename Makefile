# make demo | test | check | exactness | chaos: each makes its own environment in .venv first. Another Python: make PYTHON=python3.12 test
PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed
BIN := $(VENV)/bin

# DeepSpeed compiles extensions once; environments that share their cache rebuild them for ever.
export TORCH_EXTENSIONS_DIR := $(CURDIR)/$(VENV)/torch_extensions
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: demo test check slow exactness chaos clean

demo: $(STAMP)
	$(BIN)/parallelotope demo

test: $(STAMP)
	$(BIN)/python -m pytest -m "not slow"

slow: $(STAMP)
	$(BIN)/python -m pytest -m slow

exactness: $(STAMP)
	$(BIN)/python -m tests.exactness_table

chaos: $(STAMP)
	$(BIN)/python -m tests.chaos --kills 40 --write docs/chaos.md

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV): about 2 GB, a few minutes"
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV)
