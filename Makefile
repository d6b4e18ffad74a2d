# make demo, make test: see `make help`. Nothing but Python >= 3.10, make and (for native kernels) a C++ compiler is needed.
PYTHON ?= python3
# The torch to install; on a machine with an NVIDIA GPU the torch of $(PYTHON) is used if it has one.
TORCH ?= torch==2.13.0
VENV ?= .venv
# What is installed: this checkout, editable, or e.g. an sdist (CI).
PACKAGE ?= .
EDITABLE := $(if $(filter .,$(PACKAGE)),-e)

GPU := $(shell nvidia-smi -L 2>/dev/null | head -n 1)
# CUDA kernels are built where a GPU is visible; FUSEDRES_BUILD_CUDA=0 or 1 decides otherwise.
export FUSEDRES_BUILD_CUDA ?= $(if $(GPU),,0)

PIP := $(VENV)/bin/python -m pip --disable-pip-version-check -q
SOURCES := pyproject.toml setup.py $(shell find csrc -type f)
CXX_FILES := $(shell find csrc tests -name '*.cpp' -o -name '*.cu' -o -name '*.h')

.DEFAULT_GOAL := help
.PHONY: help demo test test-full gpu lint format check-abi sanitize clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

# what the tests need includes what the demo needs
demo: $(or $(wildcard $(VENV)/.installed-test),$(VENV)/.installed-demo)  ## train a ResNet-20 twice, eager and fused: out/demo.png (ARGS=--quick for a short one)
	$(VENV)/bin/fusedres demo --out out $(ARGS)

test: $(VENV)/.installed-test  ## the tests that CI runs (ARGS="-k add_act" for some)
	$(VENV)/bin/pytest $(ARGS)

test-full: $(VENV)/.installed-test check-abi sanitize  ## the long tier: slow tests, several torches, sanitizers
	$(VENV)/bin/pytest -m 'not gpu' $(ARGS)

# Installs nothing into the environment: the package is built into build/gpu.
gpu:  ## on a machine with a GPU: build, verify, test and measure, within 9 minutes (ARGS="--only build --only ops" for some)
	@$(or $(wildcard $(VENV)/bin/python),$(PYTHON)) -m benchmarks.gpu $(ARGS)

lint: $(VENV)/.lint  ## ruff and clang-format, changing nothing
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/clang-format --dry-run -Werror $(CXX_FILES)

format: $(VENV)/.lint  ## what lint wants, done
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $(CXX_FILES)

check-abi: $(VENV)/.installed-test  ## one build under the oldest and the newest torch, and torch-abi-audit
	$(VENV)/bin/python tests/build/check_abi.py

sanitize: $(VENV)/.installed-test  ## the C++ CPU kernels under AddressSanitizer and UBSan
	$(VENV)/bin/python tests/build/sanitize.py

clean:  ## remove what was built, but not the environment
	rm -rf build dist out *.egg-info fusedres/*.so fusedres/_build.json $(VENV)/.installed-*

$(VENV)/.torch:
	$(PYTHON) -m venv $(if $(GPU),--system-site-packages) $(VENV)
	$(PIP) install -U pip "setuptools>=77" ninja "pybind11>=2.12"
	$(VENV)/bin/python -c 'import torch' 2>/dev/null || $(PIP) install "$(TORCH)"
	@touch $@

$(VENV)/.lint: $(VENV)/.torch pyproject.toml
	$(PIP) install --group lint
	@touch $@

$(VENV)/.installed-%: $(VENV)/.torch $(SOURCES)
	$(PIP) install --no-build-isolation $(EDITABLE) "$(PACKAGE)[$*]"
	@touch $@
