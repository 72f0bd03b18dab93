# Everything runs in .venv, which is made when it is missing or when what it depends on changed.
#   TORCH_VARIANT=cpu|cuda|npu   the torch build (default: what this machine has)
#   PYTHON=python3.12            the Python to make .venv with
#   DEMO_ARGS, TEST_ARGS         passed on to npu-qat train and to pytest

PYTHON ?= python3
DEMO_ARGS ?=
TEST_ARGS ?=
TEST_JOBS ?= 2

VENV := .venv
RUN := $(VENV)/bin/python -m
# Test processes share the cores, so one thread each. pyproject.toml says which tests run by default.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-distributed contract-vllm containers test-slow contract kernels lint format types docs wheel constraints clean clean-venv FORCE

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 18

$(VENV)/.stamp: FORCE # the script compares contents, so it is asked every time
	@$(PYTHON) scripts/bootstrap.py --venv $(VENV)

setup: $(VENV)/.stamp ## make .venv

demo: $(VENV)/.stamp ## train the embedded demo in 4 bits, compare it with its baselines, report
	$(VENV)/bin/npu-qat train --device auto $(DEMO_ARGS)

test: $(VENV)/.stamp ## the tests that run on any machine
	@$(ONE_THREAD) $(RUN) pytest -n $(TEST_JOBS) --dist loadfile $(TEST_ARGS)

test-distributed: $(VENV)/.stamp ## the tests that start several processes, one after another
	@$(ONE_THREAD) $(RUN) pytest -m "distributed and not slow and not gpu" $(TEST_ARGS)

contract-vllm: ## our exports in the real vllm and vllm-ascend (an environment of its own, 2 GB)
	@$(PYTHON) tests/contract_vllm/environment.py python -m pytest -m contract tests/contract_vllm tests/deploy/test_real_reader.py tests/parity/test_library.py tests/parity/test_vllm_protocol.py $(TEST_ARGS)

test-slow: $(VENV)/.stamp ## the tests that take long
	@$(ONE_THREAD) $(RUN) pytest -m "slow and not contract and not container and not gpu" $(TEST_ARGS)

kernels: $(VENV)/.stamp ## the AscendC kernels on the host model, with their mutation tests
	@$(RUN) kernels_ascendc.build host
	@$(ONE_THREAD) $(RUN) pytest -n $(TEST_JOBS) -m "not gpu" tests/kernels_ascendc tests/backends/test_ascendc.py $(TEST_ARGS)

# Makes an environment of its own in the user's cache folder when there is none yet.
contract: ## the NPU code against the real torch-npu package, on a CPU
	@$(PYTHON) tests/contract/environment.py python -m pytest -n $(TEST_JOBS) --dist loadfile -m contract tests/contract $(TEST_ARGS)

containers: $(VENV)/.stamp ## the container images and services with a real engine (Debian, as root)
	@scripts/containers/check.sh $(CURDIR)/$(VENV)/bin/python $(TEST_ARGS)

lint: $(VENV)/.stamp ## ruff: rules and format
	@$(RUN) ruff check .
	@$(RUN) ruff format --check .

format: $(VENV)/.stamp ## let ruff rewrite the files
	@$(RUN) ruff check --fix .
	@$(RUN) ruff format .

types: $(VENV)/.stamp ## mypy
	@$(RUN) mypy

# Opens from the file system. The variable silences an advertisement of the theme's.
docs: $(VENV)/.stamp ## the manual, into build/site, with warnings as errors
	@NO_MKDOCS_2_WARNING=1 $(RUN) mkdocs build --strict

wheel: $(VENV)/.stamp ## source archive and wheel into dist/
	@$(RUN) build --no-isolation --outdir dist .

# uv keeps a version that is in the output file already; delete a line to get the newest.
constraints: $(VENV)/.stamp ## resolve constraints*.txt anew
	@PATH="$(CURDIR)/$(VENV)/bin:$$PATH" scripts/update_constraints.sh

clean: ## what tools leave behind
	rm -rf build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

clean-venv: ## .venv
	rm -rf $(VENV)
