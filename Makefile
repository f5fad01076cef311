# Every target works from a fresh clone: it makes .venv from the lock first, then does its job.

PYTHON ?= python3
PYTEST_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
CONSTRAINTS := requirements/constraints.txt
# Written last: without it, whatever stands in .venv is a set-up that broke off, and is made anew.
READY := $(VENV)/ready

PIP := $(BIN)/python -m pip --disable-pip-version-check -qq
# Two test workers: one thread each, and no memory given back to the kernel only to be asked for again.
TEST_ENV := OMP_NUM_THREADS=1 MALLOC_TRIM_THRESHOLD_=17179869184 MALLOC_MMAP_THRESHOLD_=4294967296 \
	HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false

.DEFAULT_GOAL := help
.PHONY: help demo test coverage faults lint zoo docs clients matrix clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' Makefile
	@echo 'PYTHON=python3.12 chooses the interpreter, PYTEST_ARGS="tests/core -x" the tests.'

demo: $(READY)  ## quantize the embedded model and show what it cost, without any download
	@$(BIN)/bitwright demo

test: $(READY)  ## run every test, two at a time
	@$(TEST_ENV) $(BIN)/python -m pytest -q -n 2 $(PYTEST_ARGS)

coverage: $(READY)  ## the same tests, slower, and which lines and branches of src/ they reach (htmlcov/ too)
	@$(TEST_ENV) $(BIN)/python -m pytest -q -n 2 --cov --cov-report=term --cov-report=html $(PYTEST_ARGS)

faults: $(READY)  ## change valid files into hostile ones, kill runs, and count what comes of it (an hour)
	@$(TEST_ENV) $(BIN)/python tools/faults.py --work .faults --examples 300 --kills 204 --result benchmarks/results/faults

lint: $(READY)  ## ruff (rules, format) and mypy --strict
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy

zoo: $(READY)  ## run every method on every model folder in .zoo, and write benchmarks/results/zoo.md
	@OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/zoo.py .zoo

docs: $(READY)  ## build the documentation into site/
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo 'Documentation built: open site/index.html'

clients: $(READY)  ## open quantized folders in the real clients (makes .clients, needs a network), compare
	@$(BIN)/python tools/make_clients.py
	@OMP_NUM_THREADS=1 $(BIN)/python benchmarks/clients.py

matrix: $(READY)  ## load written folders in the oldest, locked and newest transformers (makes .matrix, needs a network)
	@$(BIN)/python tools/make_matrix.py
	@OMP_NUM_THREADS=1 $(BIN)/python benchmarks/matrix.py

clean:  ## remove everything that the other targets made, .venv included
	rm -rf $(VENV) .clients .matrix .faults site build dist src/*.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis \
		htmlcov .coverage .coverage.*
	find src tests tools -name __pycache__ -type d -prune -exec rm -rf {} +

# torch goes first, with its exact version: only so is the CPU build found where there is one (docs/decisions.md).
$(READY): pyproject.toml $(CONSTRAINTS)
	@command -v "$(PYTHON)" >/dev/null || { echo 'No "$(PYTHON)" here. Bitwright needs Python 3.11 or newer: install it, or name it with make PYTHON=/path/to/python3' >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit("Bitwright needs Python 3.11 or newer, and $(PYTHON) is %d.%d. Name a newer one: make PYTHON=python3.12" % v[:2])'
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { echo '"$(PYTHON)" cannot make virtual environments. On Debian and Ubuntu: apt install python3-venv' >&2; exit 1; }
	@echo 'Setting up $(VENV) (a few minutes the first time)'
	@test -e $(READY) || "$(PYTHON)" -m venv --clear $(VENV)
	@rm -f $(READY)
	@$(PIP) install -c $(CONSTRAINTS) "$$(grep '^torch==' $(CONSTRAINTS))"
	@$(PIP) install -c $(CONSTRAINTS) setuptools
	@$(PIP) install -c $(CONSTRAINTS) --no-build-isolation -e '.[data,dev,docs,tasks]'
	@touch $(READY)
