# Everything runs from a virtual environment in this checkout; the first target that needs it makes it, and a change of
# pyproject.toml or constraints.txt renews it. Only python3 (3.11 or 3.12) with venv, and a C compiler, must be there.

VENV   := .venv
PY     := $(VENV)/bin/python
STAMP  := $(VENV)/.installed
PYTHON ?= $(shell for p in python3.11 python3.12 python3; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null && echo $$p && break; done)
PIP    := PYTHONWARNINGS=ignore $(PY) -m pip --disable-pip-version-check -q

# What the targets take: make test PYTEST_ARGS='-k store'; make demo DEMO_ARGS='--trials 64'; make bench-cpu BENCH_ARGS='--trials 128'
PYTEST_ARGS ?=
# Tests wait for servers a good part of their time: two processes of them share two cores. The tests of a file stay together.
TEST_PROCESSES ?= 2
DEMO_ARGS   ?=
DEMO_MODEL  ?= shufflenet
DEMO_TRIALS ?= 800
BENCH_ARGS  ?=

.PHONY: help setup demo test lint format protos protos-check bench-cpu bench-gpu bench-gpu-all bench-memory clean
.DEFAULT_GOAL := help

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

setup: $(STAMP) ## make or renew .venv

# The stamp holds the inputs' digest and the checkout's path, not a time: another branch does not reinstall for nothing,
# and a moved checkout does.
INPUTS := $(shell { cat pyproject.toml constraints.txt; echo '$(CURDIR)'; } | cksum | tr -d ' ')
ifneq ($(shell cat $(STAMP) 2>/dev/null),$(INPUTS))
.PHONY: $(STAMP)
endif
$(STAMP):
	@test -n "$(PYTHON)" || { echo "error: needs python3 3.11 or 3.12 with venv (Debian: apt-get install python3-venv), or make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PY) -m pip --version >/dev/null 2>&1 || { rm -rf $(VENV); echo "making $(VENV) with $(PYTHON)"; $(PYTHON) -m venv $(VENV); }
	@echo "installing into $(VENV) (a few minutes the first time)"
	@$(PIP) install -c constraints.txt -e '.[dev]'
	@echo "$(INPUTS)" > $@

# Its records stay in build/demo: a second run reuses them and measures only what is new.
demo: $(STAMP) ## tune a small real model on this machine's CPU, start to finish
	@mkdir -p build/demo
	TUNER_DATA_DIR=build/demo $(VENV)/bin/tuner-client tune "$$($(PY) examples/light_model.py $(DEMO_MODEL))" \
		--trials $(DEMO_TRIALS) --output build/demo/$(DEMO_MODEL).so $(DEMO_ARGS)
	TVM_NUM_THREADS=$$(nproc) $(PY) examples/run_built.py build/demo/$(DEMO_MODEL).so

test: $(STAMP) ## all tests that this machine can run
	$(PY) -m pytest -n $(TEST_PROCESSES) --dist loadfile $(PYTEST_ARGS)

lint: $(STAMP) ## ruff (lint and format) and mypy strict
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: $(STAMP) ## let ruff format and fix
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .

protos: $(STAMP) ## generate tuner_core/proto from protos/
	PYTHON=$(PY) scripts/protos.sh

protos-check: $(STAMP) ## fail when the committed generated code is stale
	PYTHON=$(PY) scripts/protos.sh --check

bench-cpu: $(STAMP) ## this service beside stock MetaSchedule, on this CPU
	$(PY) benchmarks/bench_cpu.py $(BENCH_ARGS)

bench-gpu: $(STAMP) ## the same on an NVIDIA GPU
	$(PY) benchmarks/bench_gpu.py $(BENCH_ARGS)

bench-gpu-all: $(STAMP) ## every GPU benchmark within a budget: BENCH_ARGS='--minutes 25 --only resnet50-float32 faults'
	$(PY) benchmarks/gpu_all.py $(BENCH_ARGS)

bench-memory: $(STAMP) ## memory of an idle server, a client, and growth over a replayed job
	$(PY) benchmarks/memory.py $(BENCH_ARGS)

clean: ## remove .venv and caches
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
