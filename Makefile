# SPDX-License-Identifier: Apache-2.0
# make demo | make test | make bench | make kernels | make docs: each makes .venv, installs and builds what is missing, and runs.
# make gpu-test does so in .venv-gpu, whose torch has CUDA.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
JOBS ?= 2
TESTS ?= tests
GPU_VENV := .venv-gpu
GPU_BIN := $(GPU_VENV)/bin
GPU_PIP := $(GPU_BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints-gpu.txt
MAX_SPILL ?= 0
SOURCES := CMakeLists.txt setup.py pyproject.toml $(shell find csrc -type f 2>/dev/null)

.DEFAULT_GOAL := help
.PHONY: help demo test gpu-test sanitize fuzz bench kernels docs format format-check doctor clean

help:
	@echo "make demo          train and compare three small models (10 minutes on 2 cores)"
	@echo "make test          run the test suite on the CPU"
	@echo "make gpu-test      run what is of CUDA on a software GPU (no GPU needed)"
	@echo "make sanitize      run the op suite and the fuzzer under AddressSanitizer and UBSan"
	@echo "make fuzz          make 20000 random calls of the ops; ARGS=\"--calls 100000\" more"
	@echo "make bench         time the ops against PyTorch's own operations"
	@echo "make kernels       compile the CUDA kernels, list and check what they take"
	@echo "make docs          build the documentation as a site into build/site"
	@echo "make doctor        say what is installed, loaded and working"
	@echo "make format        format all sources; make format-check only looks"

demo: $(VENV)/built
	@$(BIN)/unipool demo $(ARGS)

test: $(VENV)/built
	@$(BIN)/python -m pytest -n $(JOBS) -o faulthandler_exit_on_timeout=true \
	  $(TESTS) $(ARGS)

# nvcc of the machine, else of PyPI: into build/, as NVIDIA's packages would make of .venv-gpu an
# environment that takes a GPU.
ifeq ($(shell command -v nvcc),)
NVCC := build/nvcc/installed
export PATH := $(CURDIR)/build/nvcc/packages/nvidia/cu13/bin:$(PATH)
endif

# An H100's profile; of the whole suite also what only the code for sm_80 needs, on an A100's, the
# coverage of the kernels, and bench/gpu_check.sh rehearsed.
GPU_TEST := UNIPOOL_LIBRARY_DIR=$(CURDIR)/build/gpu-test/package/lib SOFTGPU_SMS=8 \
  SOFTGPU_COVERAGE=$(CURDIR)/build/coverage
GPU_PYTEST := $(GPU_BIN)/python -m pytest -n $(JOBS) -o faulthandler_exit_on_timeout=true

gpu-test: $(GPU_VENV)/installed $(NVCC)
	@$(GPU_BIN)/python softgpu/build.py
	@PATH="$(CURDIR)/$(GPU_BIN):$$PATH" $(MAKE) --no-print-directory gpu-library
	@rm -rf build/coverage
	@$(GPU_TEST) $(GPU_PYTEST) -k "cuda or softgpu" $(TESTS) $(ARGS)
ifeq ($(TESTS),tests)
	@echo "the kernels of sm_80"
	@$(GPU_TEST) SOFTGPU_GPU=a100 $(GPU_PYTEST) -k "cuda and bf16" tests/ops/test_kernel_cases.py
	@$(GPU_BIN)/python -m softgpu.coverage build/coverage \
	  --libraries build/gpu-test/package/lib --named 7unipool --require 98
	@echo "rehearsal of bench/gpu_check.sh"
	@rm -rf build/rehearsal
	@PYTHON=$(CURDIR)/$(GPU_BIN)/python SOFTGPU_SMS=8 bench/gpu_check.sh build/rehearsal \
	  --rehearse --prebuilt build/gpu-test/package
endif

# The op library for the torch of .venv-gpu, with the kernels that make kernels compiled or will.
.PHONY: gpu-library
gpu-library:
	@test -e build/kernels/build.ninja || cmake -S . -B build/kernels -GNinja --log-level=NOTICE \
	  -DPython_EXECUTABLE=$(CURDIR)/$(GPU_BIN)/python -DUNIPOOL_CUDA=KERNELS
	@echo "building the op library with its CUDA kernels (minutes the first time)"
	@cmake --build build/kernels --target unipool_kernels_archive --parallel $(JOBS) \
	  > build/kernels/archive.txt 2>&1 || { cat build/kernels/archive.txt; exit 1; }
	@cmake -S . -B build/gpu-test -GNinja --log-level=NOTICE -DUNIPOOL_CUDA=ON \
	  -DPython_EXECUTABLE=$(CURDIR)/$(GPU_BIN)/python \
	  -DUNIPOOL_KERNELS=$(CURDIR)/build/kernels/libunipool_kernels.a
	@cmake --build build/gpu-test --parallel $(JOBS) > build/gpu-test/log.txt 2>&1 \
	  || { cat build/gpu-test/log.txt; exit 1; }
	@cmake --install build/gpu-test --prefix build/gpu-test/package > build/gpu-test/install.txt
	@test -e $(VENV)/built || cp build/gpu-test/package/_C*.so unipool/  # knows no torch

# The sanitizers' runtimes come first in an ordinary Python, and libstdc++ with them, whose
# __cxa_throw they look up before torch has brought it. No leaks are looked for: Python and torch keep
# much until the end on purpose, and the ops own no memory but by tensors and vectors. Absurd sizes
# have to fail as they do elsewhere: by an error, not by an abort.
SANITIZERS := address,undefined
preloaded = $(shell $(or $(CXX),c++) -print-file-name=$(1))
SANITIZED := LD_PRELOAD="$(call preloaded,libasan.so) $(call preloaded,libubsan.so) $(call preloaded,libstdc++.so.6)" \
  ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1:max_allocation_size_mb=4096 \
  UBSAN_OPTIONS=print_stacktrace=1 UNIPOOL_LIBRARY_DIR=$(CURDIR)/build/sanitize
SANITIZED_TESTS ?= tests/ops/test_hostile_calls.py tests/ops/test_cpu_products.py \
  tests/ops/test_dispatch.py tests/ops/test_expert_mlp.py tests/ops/test_grouped_mm.py \
  tests/ops/test_grouped_wgrad.py tests/ops/test_router.py tests/ops/test_router_logits.py
SANITIZED_FUZZ ?= --seconds 60

sanitize: $(VENV)/built
	@PATH="$(CURDIR)/$(BIN):$$PATH" cmake -S . -B build/sanitize -GNinja --log-level=NOTICE \
	  -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python -DUNIPOOL_CUDA=OFF -DUNIPOOL_SANITIZE=$(SANITIZERS)
	@echo "building the op library with $(SANITIZERS)"
	@PATH="$(CURDIR)/$(BIN):$$PATH" cmake --build build/sanitize --target unipool_cpu --parallel $(JOBS) \
	  > build/sanitize/log.txt 2>&1 || { cat build/sanitize/log.txt; exit 1; }
	@$(SANITIZED) $(BIN)/python -m pytest -q -n $(JOBS) -k "not cuda" $(SANITIZED_TESTS)
	@$(SANITIZED) $(BIN)/python bench/fuzz.py --calls 1000000 $(SANITIZED_FUZZ)

fuzz: $(VENV)/built
	@$(BIN)/python bench/fuzz.py $(ARGS)

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
	rm -rf build $(VENV) $(GPU_VENV) unipool/lib unipool/_C*.so *.egg-info

.PHONY: python
python:
	@command -v $(PYTHON) >/dev/null || { echo "unipool: $(PYTHON) not found: install Python 3.10 or newer, or say make PYTHON=..."; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "unipool: $(PYTHON) is older than 3.10: say make PYTHON=python3.11"; exit 1; }

$(VENV)/installed: pyproject.toml constraints.txt | python
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

# torch comes without what it asks for, which are NVIDIA's libraries but for what it imports;
# accelerate, too, since it asks for torch.
$(GPU_VENV)/installed: constraints-gpu.txt | python
	@test -x $(GPU_BIN)/python || { echo "making $(GPU_VENV)"; $(PYTHON) -m venv $(GPU_VENV); }
	@echo "installing PyTorch with CUDA (a wheel of 0.5 GB the first time)"
	@{ $(GPU_PIP) --no-deps torch accelerate nvidia-cutlass && $(GPU_PIP) setuptools filelock \
	  typing-extensions sympy networkx jinja2 fsspec cmake ninja pybind11 numpy transformers typer \
	  rich matplotlib safetensors pytest pytest-xdist hypothesis psutil nvtx; } 2> $(GPU_VENV)/log.txt || { \
	  echo "unipool: make gpu-test cannot install its torch: $$(grep -m1 ^ERROR $(GPU_VENV)/log.txt)"; exit 1; }
	@touch $@

build/nvcc/installed: constraints-gpu.txt | python
	@echo "installing nvcc"
	@rm -rf build/nvcc && $(PYTHON) -m venv build/nvcc/venv
	@build/nvcc/venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-gpu.txt \
	  --no-deps --target build/nvcc/packages nvidia-cuda-nvcc nvidia-cuda-crt nvidia-nvvm \
	  nvidia-cuda-cccl nvidia-cuda-runtime nvidia-nvtx 2> build/nvcc/log.txt || { \
	  echo "unipool: there is no nvcc, and none can be installed: $$(grep -m1 ^ERROR build/nvcc/log.txt)"; exit 1; }
	@ln -s lib build/nvcc/packages/nvidia/cu13/lib64  # where nvcc looks
	@touch $@

$(VENV)/built: $(VENV)/installed $(SOURCES)
	@echo "[3/3] building the extension"
	@$(BIN)/python setup.py -q build_ext --inplace
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
	@touch $@

# Compiles every CUDA file, with or without a CUDA torch, and links nothing. The objects, in
# build/kernels, are those of the op library.
kernels: $(VENV)/installed $(NVCC)
	@PATH="$(CURDIR)/$(BIN):$$PATH" cmake -S . -B build/kernels -GNinja --log-level=NOTICE \
	  -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python -DUNIPOOL_CUDA=KERNELS
	@PATH="$(CURDIR)/$(BIN):$$PATH" cmake --build build/kernels --target unipool_kernels unipool_cuda --clean-first \
	  > build/kernels/log.txt 2>&1 || { cat build/kernels/log.txt; exit 1; }
	@$(BIN)/python profiling/kernel_table.py build/kernels/log.txt --max-spill $(MAX_SPILL) \
	  --objects $$(find build/kernels -name '*.cu.o')
