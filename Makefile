# attnlab: everything a reader or a developer runs. Needs make and Python 3.12 or newer.
#
#   make book       execute the chapters, build the book, serve it (PORT=8000)
#   make html       the same without serving
#   make lab        open the chapters in JupyterLab
#   make test       everything that must pass: ruff, mypy, pytest (PYTEST="-k masks" to narrow)
#   make slow       the long tests as well
#   make cuda       compile the kernels for GPUs that are not there (installs the CUDA plugin)
#   make support    run the contract and refresh the book's support table
#   make bench      print the benchmark tables
#   make clean      remove what was built; make distclean: the environment too

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

VENV    ?= .venv
PYTHON  ?=
PORT    ?= 8000
WORKERS ?= auto
PYTEST  ?=
BIN     := $(VENV)/bin
HTML    := build/html

export PIP_DISABLE_PIP_VERSION_CHECK = 1
export ALLOW_MULTIPLE_LIBTPU_LOAD = 1
# The TPU compiler on a machine without a TPU: say so, or it searches for one, loudly.
ifeq ($(wildcard /dev/accel* /dev/vfio/*),)
export TPU_SKIP_MDS_QUERY ?= 1
export TPU_WORKER_HOSTNAMES ?= localhost
export TPU_ACCELERATOR_TYPE ?= v5litepod-4
endif

.PHONY: help book html lab lint test slow cuda support bench clean distclean
help:
	@sed -n '2,/^$$/s/^# \{0,1\}//p' Makefile

# --- the environment: one, with a stamp per set of extras, renewed when pyproject.toml changes

$(BIN)/python:
	@PYTHON="$(PYTHON)" bash book/tools/make_venv.sh $(VENV)

$(VENV)/.book-stamp: pyproject.toml | $(BIN)/python
	@bash book/tools/install.sh $(VENV) book
	@touch $@

$(VENV)/.test-stamp: pyproject.toml | $(BIN)/python
	@bash book/tools/install.sh $(VENV) dev,book,tpu
	@touch $@

# --- the book

html: $(VENV)/.book-stamp
	@$(BIN)/python book/build.py --output $(HTML)

book: html
	@$(BIN)/python book/tools/serve.py $(HTML) --port $(PORT)

lab: $(VENV)/.book-stamp
	@$(BIN)/jupyter lab --notebook-dir=chapters

# --- the tests

lint: $(VENV)/.test-stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not slow" $(PYTEST)

slow: $(VENV)/.test-stamp
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(PYTEST)

# The CUDA compiler takes no GPU, but 4 GB of its own environment.
$(VENV)-cuda/.stamp: pyproject.toml
	@PYTHON="$(PYTHON)" bash book/tools/make_venv.sh $(VENV)-cuda
	@bash book/tools/install.sh $(VENV)-cuda dev,cuda
	@touch $@

cuda: $(VENV)-cuda/.stamp
	JAX_PLATFORMS=cpu $(VENV)-cuda/bin/python -m pytest -s tests/kernels/test_compiled_gpu.py \
	  tests/kernels/test_inspect.py tests/kernels/test_linear_compiled.py $(PYTEST)

support: $(VENV)/.test-stamp
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal tests/contract $(PYTEST)
	@$(BIN)/python book/tools/keep_support.py

bench: $(VENV)/.test-stamp
	@for table in memory time window train; do $(BIN)/attnlab bench $$table; done

# --- tidying

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)
