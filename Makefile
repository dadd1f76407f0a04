# Everything sets itself up: a virtual environment in .venv with the versions pinned in constraints.txt.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help setup demo test test-slow lint format clean

help:
	@echo "make demo       measure this machine, plan, train on 4 ranks, compare (under 4 minutes)"
	@echo "make test       the fast tests, real multi-process ones included"
	@echo "make test-slow  the tests that take long"
	@echo "make lint       ruff and pyright"
	@echo "make format     ruff, in place"
	@echo "make setup      only the virtual environment"

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "pipermoe needs Python 3.11 or newer; set PYTHON=/path/to/python3.11"; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null \
	  || { echo "Python has no venv module; on Debian: apt-get install python3-venv"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[train,tokenizers]'
	$(BIN)/pip install --quiet --constraint constraints.txt hypothesis pyright pytest pytest-timeout pytest-xdist ruff
	@touch $(READY)

demo: $(READY)
	$(BIN)/pipermoe demo

test: $(READY)
	$(BIN)/pytest -n 2 -m 'not slow'

test-slow: $(READY)
	$(BIN)/pytest -n 2 -m slow

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis demo
