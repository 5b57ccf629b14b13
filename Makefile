# The whole road: `make train` and `make test` build what they need. A second call is quick.
# PYTHON=/path/to/python3.12 chooses the interpreter that .venv is built with.

SHELL := /bin/bash
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:

FIND_PYTHON = for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && { echo $$p; break; }; \
	done
PYTHON ?= $(shell $(FIND_PYTHON))
VENV := .venv
BIN := $(VENV)/bin
# DeepSpeed must not compile its operators at install time; nothing here needs them before they are used.
PIP = DS_BUILD_OPS=0 $(BIN)/python -m pip --disable-pip-version-check
RUN = PYTHONUNBUFFERED=1 PATH="$(CURDIR)/$(BIN):$$PATH"
ON_SLURM = $(RUN) OMP_NUM_THREADS=1 COATNET_SLURM=1 tests/slurm/cluster/with.sh --install
CHECKED := configs models data_pipeline trainer slurm tests

.PHONY: help train test lint types slow test-slurm slow-slurm test-pages gpu-check lock wheels clean

help:
	@echo 'make train      builds .venv, makes shards of real digits, trains and evaluates a small CoAtNet'
	@echo 'make test       builds .venv and runs every fast test (make slow: the others)'
	@echo 'make test-slurm submission and recovery on a SLURM cluster that it starts here as root (slow-slurm: the others)'
	@echo 'make test-pages the report in a real browser; installs Debian packages of chromium where it may'
	@echo 'make lint types ruff; strict mypy'
	@echo 'make wheels     wheels/ for machines without a network, of the versions in requirements.lock (make lock writes it)'
	@echo 'make gpu-check  tests and a short benchmark on this CUDA machine; needs no network'
	@echo 'make clean      removes .venv, caches and build outputs; data and runs stay'

train: $(VENV)/.ready-demo
	$(RUN) coatnet data demo --out data/digits
	$(RUN) coatnet train demo-digits

test: $(VENV)/.ready-dev
	$(RUN) OMP_NUM_THREADS=1 python -m pytest -q -n 2 --dist loadfile -m 'not slow and not gpu and not slurm and not browser'

slow: $(VENV)/.ready-dev
	$(RUN) OMP_NUM_THREADS=1 python -m pytest -q -m 'slow and not slurm' --timeout 3600

# On a real cluster of four nodes that is started on this machine as root, and ended again; fails where it cannot be.
test-slurm: $(VENV)/.ready-dev
	$(ON_SLURM) python -m pytest -q -m 'slurm and not slow' tests/slurm

slow-slurm: $(VENV)/.ready-dev
	$(ON_SLURM) python -m pytest -q -m 'slurm and slow' --timeout 3600 tests/slurm

test-pages: $(VENV)/.ready-dev
	@tests/pages/install.sh
	$(RUN) OMP_NUM_THREADS=1 COATNET_PAGES=1 python -m pytest -q -m 'browser and not slow' tests/pages

lint: $(VENV)/.ready-dev
	$(BIN)/ruff check $(CHECKED)
	$(BIN)/ruff format --check $(CHECKED)

types: $(VENV)/.ready-dev
	$(BIN)/mypy

# Exact versions of what .venv has, for other machines. Made by hand when the tested environment changes.
lock: $(VENV)/.ready-dev
	$(BIN)/python -m trainer.machine.lock demo dev slurm > requirements.lock

# Everything that a machine without a network installs from: pip install --no-index --find-links wheels 'coatnet[slurm]'
wheels: $(VENV)/.ready-demo requirements.lock
	$(PIP) wheel -q --no-deps -w wheels -r requirements.lock
	$(PIP) wheel -q --no-deps -w wheels . && rm -rf build  # which a later wheel would take old files from

# Takes .venv where there is one, else the first Python that has torch. Installs nothing.
gpu-check:
	@for p in $(BIN)/python "$(PYTHON)" python3 python; do \
		"$$p" -c 'import torch' >/dev/null 2>&1 || continue; \
		echo "gpu-check with $$p"; PYTHONPATH="$(CURDIR)$${PYTHONPATH:+:$$PYTHONPATH}" exec "$$p" tests/gpu/check.py; done; \
	echo 'no Python with torch found; say make gpu-check PYTHON=/path/to/python' >&2; exit 1

# .installing marks a pip that has not finished: after a killed one, or without a working pip, .venv is made anew.
# The install is editable, so later edits of the code need no other.
define install
	@if test -e $(VENV)/.installing || ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
		"$(PYTHON)" -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' || \
			{ echo 'no Python >= 3.11 with venv: "$(PYTHON)"; say make PYTHON=/path/to/python' >&2; exit 1; }; \
		"$(PYTHON)" -m venv --clear $(VENV) || exit 1; fi
	@touch $(VENV)/.installing
	$(PIP) install -q -e '.[$(EXTRAS)]'
	@rm $(VENV)/.installing
endef

$(VENV)/.ready-demo: EXTRAS := demo
$(VENV)/.ready-demo: pyproject.toml
	$(install)
	@touch $@

$(VENV)/.ready-dev: EXTRAS := demo,dev
$(VENV)/.ready-dev: pyproject.toml
	$(install)
	@touch $@ $(VENV)/.ready-demo

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find $(CHECKED) -name __pycache__ -type d -prune -exec rm -rf {} +
