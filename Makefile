# SPDX-License-Identifier: Apache-2.0
# make demo | make test | make bench | make kernels | make docs: each makes .venv, installs and builds what is missing, and runs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
JOBS ?= 2
TESTS ?= tests
MAX_SPILL ?= 0
SOURCES := CMakeLists.txt setup.py pyproject.toml $(shell find csrc -type f 2>/dev/null)

.DEFAULT_GOAL := help
.PHONY: help demo test bench kernels docs format format-check doctor clean

help:
	@echo "make demo          train and compare three small models (10 minutes on 2 cores)"
	@echo "make test          run the test suite"
	@echo "make bench         time the ops against PyTorch's own operations"
	@echo "make kernels       compile the CUDA kernels and list their registers (needs nvcc)"
	@echo "make docs          build the documentation as a site into build/site"
	@echo "make doctor        say what is installed, loaded and working"
	@echo "make format        format all sources; make format-check only looks"

demo: $(VENV)/built
	@$(BIN)/unipool demo $(ARGS)

test: $(VENV)/built
	@echo "building the CUDA kernels for the CPU, to test them"
	@$(BIN)/python emulation/build.py fast >/dev/null || true
	@$(BIN)/python -m pytest -n $(JOBS) -o faulthandler_exit_on_timeout=true $(TESTS) $(ARGS)

bench: $(VENV)/built
	@$(BIN)/python bench/bench_ops.py $(ARGS)

doctor: $(VENV)/built
	@$(BIN)/unipool doctor $(ARGS)

format: $(VENV)/installed
	@$(BIN)/ruff check --fix . && $(BIN)/ruff format .
	@git ls-files '*.cpp' '*.h' '*.cu' '*.cuh' | xargs $(BIN)/clang-format -i

format-check: $(VENV)/installed
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .
	@git ls-files '*.cpp' '*.h' '*.cu' '*.cuh' | xargs $(BIN)/clang-format --dry-run -Werror

clean:
	rm -rf build $(VENV) unipool/lib unipool/_C*.so *.egg-info

$(VENV)/installed: pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "unipool: $(PYTHON) not found: install Python 3.10 or newer, or say make PYTHON=..."; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "unipool: $(PYTHON) is older than 3.10: say make PYTHON=python3.11"; exit 1; }
	@test -x $(BIN)/python || { echo "[1/3] making $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "[2/3] installing PyTorch and the libraries (minutes the first time)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
	  'setuptools>=77' wheel cmake ninja pybind11 torch numpy \
	  'transformers>=5.17' accelerate 'typer>=0.19' rich matplotlib safetensors 'lm-eval>=0.4.13' \
	  pytest pytest-xdist hypothesis psutil ruff clang-format nvtx
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -c constraints.txt nvidia-cutlass
	@touch $@

# Reads the sources only: neither the extension nor a network is needed once the tools are there.
docs: $(VENV)/documents
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "documentation: build/site/index.html"

$(VENV)/documents: $(VENV)/installed
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
	  mkdocs-material 'mkdocstrings[python]'
	@touch $@

$(VENV)/built: $(VENV)/installed $(SOURCES)
	@echo "[3/3] building the extension"
	@$(BIN)/python setup.py -q build_ext --inplace
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
	@touch $@

# Compiles every CUDA file, with or without a CUDA torch, and links nothing.
kernels: $(VENV)/installed
	@command -v nvcc >/dev/null || { echo "unipool: make kernels needs nvcc: install the CUDA toolkit"; exit 1; }
	@PATH="$(CURDIR)/$(BIN):$$PATH" cmake -S . -B build/kernels -GNinja --log-level=NOTICE \
	  -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python -DUNIPOOL_CUDA=KERNELS
	@PATH="$(CURDIR)/$(BIN):$$PATH" cmake --build build/kernels --target unipool_kernels unipool_cuda --clean-first \
	  > build/kernels/log.txt 2>&1 || { cat build/kernels/log.txt; exit 1; }
	@$(BIN)/python profiling/kernel_table.py build/kernels/log.txt --max-spill $(MAX_SPILL)
