# Everything below sets up what it needs in a local .venv first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
CONSTRAINTS ?= constraints-cpu.txt
RUN ?= runs/demo
# A process for each core, of one thread: Triton's interpreter is Python.
PARALLEL := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal

# Packages that `test-oldest` finds before the environment's own; found by their absolute path from any folder.
OLDEST := $(abspath $(VENV))/oldest
OLDEST_READY := $(OLDEST)/.ready
# Every kernel compiled for every target, then interpreted: results, tiles, rounding, the checks and the tuner.
OLDEST_TESTS := $(addprefix tests/,bench/audit bench/test_gpu.py bench/tune/test_tune.py \
	$(addprefix plora_kernels/,kernels/test_designs.py kernels/test_replay.py ops/test_numerics.py \
	ops/test_grouped_linear.py ops/test_grouped_weights.py ops/test_projections.py test_counter_rng.py test_folding.py))

# Likewise the libraries of quantised weights: found by transformers, they print notices at every import.
QUANTIZED := $(abspath $(VENV))/quantized
QUANTIZED_READY := $(QUANTIZED)/.ready

# An environment beside the other, with the versions of a GPU machine.
DEVICE_VENV ?= .venv-device
DEVICE_PYTHON ?= python3.12

# The site needs neither torch nor the library: docstrings are read from its source.
DOCS_VENV ?= .venv-docs
DOCS_READY := $(DOCS_VENV)/.ready
MKDOCS := NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/python -m mkdocs

.PHONY: demo test test-slow test-oldest test-quantized test-device-versions bench bench-simulation bench-models lint format \
	docs docs-serve clean help
.DEFAULT_GOAL := help

help:  ## show what there is
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 22

# torch goes first and pinned: asked for through another package, pip may take a build with CUDA for gigabytes.
$(READY): pyproject.toml $(CONSTRAINTS)
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (once; a few minutes)"
	@$(BIN)/python -m pip install --quiet -c $(CONSTRAINTS) torch
	@$(BIN)/python -m pip install --quiet -c $(CONSTRAINTS) -e '.[dev]'
	@touch $@

# Without what they depend on: that is in the environment already.
$(OLDEST_READY): constraints-oldest.txt | $(READY)
	@echo "installing into $(OLDEST) (once; a minute)"
	@rm -rf $(OLDEST)
	@$(BIN)/python -m pip install --quiet --no-deps -c constraints-oldest.txt --target $(OLDEST) triton numpy
	@touch $@

$(QUANTIZED_READY): constraints-quantized.txt | $(READY)
	@echo "installing into $(QUANTIZED) (once; a minute)"
	@rm -rf $(QUANTIZED)
	@$(BIN)/python -m pip install --quiet --no-deps -c constraints-quantized.txt --target $(QUANTIZED) bitsandbytes torchao
	@touch $@

$(DOCS_READY): constraints-docs.txt
	@test -x $(DOCS_VENV)/bin/python || $(PYTHON) -m venv $(DOCS_VENV)
	@echo "installing into $(DOCS_VENV) (once; half a minute)"
	@$(DOCS_VENV)/bin/python -m pip install --quiet -c $(abspath constraints-docs.txt) \
		mkdocs-material 'mkdocstrings[python]' ruff
	@touch $@

demo: $(READY)  ## a federated run on handwritten digits, start to finish
	$(BIN)/python -m fed run digits --out $(RUN) --overwrite

test: $(READY)  ## the default tests
	$(PARALLEL)

test-slow: $(READY)  ## the tests that take minutes
	$(PARALLEL) -m slow

# Tests of the torch path alone have nothing to do with Triton.
test-oldest: $(OLDEST_READY)  ## the kernels with the oldest Triton they are held to
	PYTHONPATH=$(OLDEST) $(PARALLEL) --triton $$(sed -n 's/^triton==//p' constraints-oldest.txt) \
		-k "not [torch- and not [torch] and not torch_path" $(OLDEST_TESTS)
	PYTHONPATH=$(OLDEST) $(BIN)/python -m bench.audit --targets gfx942 --no-designs  # what it once did not compile

test-quantized: $(QUANTIZED_READY)  ## adapters over quantised weights, with the libraries that make them
	PYTHONPATH=$(QUANTIZED) $(PARALLEL) --quantized tests/plora_kernels/nn/quantized tests/fed/models/quantized

# By hand, not in CI: torch's build for GPUs and what comes with it are several GB. It needs no GPU.
test-device-versions:  ## the default tests with the versions of a GPU machine
	$(MAKE) test VENV=$(DEVICE_VENV) PYTHON=$(DEVICE_PYTHON) CONSTRAINTS=constraints-device.txt

bench: $(READY)  ## layers and whole models against PEFT, torch.compile'd PEFT and the bare base
	$(BIN)/python -m pytest bench --benchmark-only -k "not simulation" --benchmark-json=bench/results/latest.json
	$(BIN)/python -m bench.report bench/results/latest.json --keep

bench-simulation: $(READY)  ## training steps of many clients, against a PEFT loop, vmap and the bare base model
	$(BIN)/python -m pytest bench --benchmark-only -k simulation --benchmark-json=bench/results/simulation-cpu.json
	$(BIN)/python -m bench.report bench/results/simulation-cpu.json --png docs/bench-simulation.png \
		--document docs/benchmarks.md --document README.md

bench-models: $(READY)  ## a training step of whole models, of PEFT's, this library's and the bare one
	$(BIN)/python -m pytest bench --benchmark-only -k models --benchmark-json=bench/results/models-cpu.json
	$(BIN)/python -m bench.report bench/results/models-cpu.json --document docs/benchmarks.md --document README.md

lint: $(READY)  ## ruff and mypy
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

format: $(READY)  ## let ruff rewrite what it can
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

docs: $(DOCS_READY)  ## the site of docs/, into build/site
	$(DOCS_VENV)/bin/python -m doctest docs/site/docstrings.py
	$(MKDOCS) build --quiet --strict

docs-serve: $(DOCS_READY)  ## the same at http://127.0.0.1:8000, built anew when a page changes
	$(MKDOCS) serve --strict

clean:  ## remove the environments and caches
	rm -rf $(VENV) $(DEVICE_VENV) $(DOCS_VENV) build/site .pytest_cache .mypy_cache .ruff_cache
