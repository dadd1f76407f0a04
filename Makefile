# Everything sets itself up: a virtual environment in .venv with the versions pinned in constraints.txt.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help setup demo test test-slow test-counts test-frameworks lint format clean

help:
	@echo "make demo       measure this machine, plan, train on 4 ranks, compare (under 4 minutes)"
	@echo "make test       the fast tests, real multi-process ones included"
	@echo "make test-slow  the tests that take long"
	@echo "make test-counts  hold models against transformers (own environment, 1.3 GB)"
	@echo "make test-frameworks  hold exported jobs against Megatron-LM, torchtitan, DeepSpeed (own environment, 1.6 GB)"
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
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[train,tokenizers,plots,exact]'
	$(BIN)/pip install --quiet --constraint constraints.txt hypothesis pyright pytest pytest-timeout pytest-xdist ruff
	@touch $(READY)

demo: $(READY)
	$(BIN)/pipermoe demo

test: $(READY)
	$(BIN)/pytest -n 2 -m 'not slow'

test-slow: $(READY)
	$(BIN)/pytest -n 2 -m slow

# transformers is the oracle of parameter counts, logits and gradients; it lives in an environment of its own.
COUNTS := .venv-counts
$(COUNTS)/.ready: constraints.txt
	$(PYTHON) -m venv $(COUNTS)
	$(COUNTS)/bin/pip install --quiet --constraint constraints.txt torch==2.13.0 transformers==5.23.0 \
	  pytest pytest-timeout hypothesis
	$(COUNTS)/bin/pip install --quiet --no-deps aiconfigurator-core==0.12.0
	$(COUNTS)/bin/pip install --quiet --constraint constraints.txt --editable .
	@touch $@

test-counts: $(COUNTS)/.ready
	$(COUNTS)/bin/pytest -m slow tests/specs/hf/test_hf_against_transformers.py tests/modules/hf/test_weights.py

# The frameworks that plans are exported to judge the exported jobs, without a GPU, in an environment of their own.
# megatron-core asks for Python 3.12; what the checks use of it runs on 3.11.
FRAMEWORKS := .venv-frameworks
$(FRAMEWORKS)/.ready: constraints.txt
	$(PYTHON) -m venv $(FRAMEWORKS)
	$(FRAMEWORKS)/bin/pip install --quiet torch==2.13.0 torchtitan==0.3.0 einops pytest pytest-timeout hypothesis \
	  setuptools wheel ninja
	DS_BUILD_OPS=0 $(FRAMEWORKS)/bin/pip install --quiet --no-build-isolation deepspeed==0.19.8
	$(FRAMEWORKS)/bin/pip install --quiet --no-deps --ignore-requires-python megatron-core==0.19.2
	$(FRAMEWORKS)/bin/pip install --quiet --editable .
	@touch $@

test-frameworks: $(FRAMEWORKS)/.ready
	for framework in megatron torchtitan deepspeed; do \
	  $(FRAMEWORKS)/bin/pytest -m slow tests/export/test_$${framework}_accepts.py || exit 1; \
	done
	$(FRAMEWORKS)/bin/pytest tests/distributed/test_trainer.py -k tensorboard  # which torchtitan brings along

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(COUNTS) $(FRAMEWORKS) .pytest_cache .ruff_cache .hypothesis demo
