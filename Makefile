# Assay. `make` alone lists the commands. Any setting is overridden on the command line, as in
#   make train lr=1e-4 method=qlora
# and what make cannot take as NAME=VALUE goes through ARGS='...', as in
#   make train ARGS='--multirun lr=1e-4,1e-3'

SHELL := /bin/bash
.DEFAULT_GOAL := help

VENV ?= .venv
PYTHON ?= python3
TRAIN_CONFIG ?= train
EVAL_CONFIG ?= eval
BASELINE_CONFIG ?= eval_baseline
COMPARE_CONFIG ?= compare
REPORT_CONFIG ?= report
VALIDATE_CONFIG ?= validate
PUBLISH_CONFIG ?= publish

# `make train PY=python` uses that Python and installs nothing.
PY ?= $(VENV)/bin/python
READY := $(if $(filter file,$(origin PY)),$(VENV)/.installed)
READY_DEV := $(if $(filter file,$(origin PY)),$(VENV)/.installed-dev)
READY_DOCS := $(if $(filter file,$(origin PY)),$(VENV)/.installed-docs)

# NAME=VALUE on the command line is a setting if NAME has a lower-case letter, else a variable of make. Only the names
# come from MAKEOVERRIDES, where make escapes the values; each value is used as it was typed.
LETTERS := a b c d e f g h i j k l m n o p q r s t u v w x y z
EMPTY :=
SPACE := $(EMPTY) $(EMPTY)
TAB := $(EMPTY)	$(EMPTY)
define NEWLINE


endef
WORDS = $(subst $(NEWLINE),_,$(subst \$(TAB),_,$(subst \$(SPACE),_,$(subst \\,_,$(MAKEOVERRIDES)))))
lower = $(strip $(foreach l,$(LETTERS),$(findstring $(l),$(1))))
NAMES = $(foreach w,$(WORDS),$(foreach n,$(firstword $(subst =, ,$(w))),$(if $(call lower,$(n)),$(n))))
SETTINGS = $(foreach n,$(NAMES),$(n)=$(value $(n)))
quoted = '$(subst ','\'',$(1)=$(value $(1)))'
OVERRIDES = $(foreach n,$(NAMES),$(call quoted,$(n))) $(ARGS)
# Settings are not exported: a question_key in the environment would be redacted as a secret.
unexport $(NAMES)
ONLY = $(foreach n,$(filter $(1),$(NAMES)),$(call quoted,$(n)))
MAIN = $(PY) -m src.main

# On a server. Variables such as RUN count only on make's command line, not from the environment: the names are common.
typed = $(if $(filter command,$(firstword $(origin $(1)))),$(value $(1)))
inquotes = '$(subst ','\'',$(1))'
run = $(if $(call typed,RUN),$(call inquotes,$(call typed,RUN)))
flag = $(if $(call typed,$(2)),$(call inquotes,$(1)=$(call typed,$(2))))
bare = $(if $(filter-out 0,$(call typed,$(2))),$(1))
STARTED = $(call bare,--detach,DETACH) $(call flag,--also,ALSO) $(call flag,--run,RUN)
SSH_TRAIN := ssh-check-data ssh-plan ssh-train
SSH_PUBLISH := ssh-publish ssh-publish-hf
SSH_OTHERS := ssh-eval ssh-eval-baseline ssh-compare ssh-report ssh-validate
SSH_STAGES := $(SSH_TRAIN) $(SSH_PUBLISH) $(SSH_OTHERS) ssh-data-push
$(SSH_TRAIN): CONFIG = $(TRAIN_CONFIG)
$(SSH_PUBLISH): CONFIG = $(PUBLISH_CONFIG)
ssh-eval: CONFIG = $(EVAL_CONFIG)
ssh-eval-baseline: CONFIG = $(BASELINE_CONFIG)
ssh-compare: CONFIG = $(COMPARE_CONFIG)
ssh-report: CONFIG = $(REPORT_CONFIG)
ssh-validate: CONFIG = $(VALIDATE_CONFIG)

# The demo's models are built if the settings use them.
DEMO := models/SmolLM2-135M-Instruct/config.json
TINY := models/tiny-random-llama/config.json
GIVEN = $(SETTINGS) $(ARGS)
tiny = $(patsubst experiment=smoke$(1),model_name=models/tiny-random-$(2),$(3))
NAMED = $(call tiny,,llama,$(call tiny,_seq2seq,t5,$(call tiny,_classification,bert,$(GIVEN))))
TINIES = $(patsubst model_name=%,%/config.json,$(filter model_name=models/tiny-random-%,$(NAMED)))
MODEL = $(or $(TINIES),$(if $(filter model_name=% model=% experiment=% model_path=% --config-%,$(GIVEN))$(filter-out resume=auto resume=never,$(filter resume=%,$(GIVEN))),,$(DEMO)))
MODEL_IF = $(if $(filter $(1),$(2)),$(MODEL))

.PHONY: help venv install convert data-push model tiny-model check-data plan train eval eval-baseline compare report validate publish publish-hf runs demo \
	push ssh-init $(SSH_STAGES) ssh-status ssh-logs ssh-attach ssh-stop ssh-fetch ssh-shell ssh-tensorboard \
	test lint format docs clean

help:  ## List these commands
	@echo "Assay: fine-tune a language model, prove that it is better, publish it."
	@echo
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-18s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

venv: $(VENV)/bin/python  ## Create the virtual environment in .venv

install: $(VENV)/.installed  ## Install the pinned dependencies into .venv (torch first)

convert: $(READY)  ## Convert multi-line JSON and ChatGPT exports under data/ to JSONL
	$(PY) scripts/convert_data.py $(ARGS)

# The message is passed in the environment: Hydra's grammar does not accept an apostrophe.
data-push ssh-data-push: override export MESSAGE := $(value MESSAGE)
data-push: $(READY)  ## Commit a folder to lakeFS: make data-push MESSAGE="what is new" data_source.repo=NAME
	$(MAIN) data-push $(if $(MESSAGE),'message=$${oc.env:MESSAGE}') $(OVERRIDES)

model: $(DEMO)  ## Build the demo's base model, SmolLM2-135M-Instruct, without the Hub

tiny-model: $(TINY)  ## Build the tiny random model of experiment=smoke

check-data: $(READY) $(call MODEL_IF,train,$(TRAIN_CONFIG))  ## Show which rows a training run would use, and which not and why
	$(MAIN) check-data --config-name $(TRAIN_CONFIG) $(OVERRIDES)

plan: $(READY) $(call MODEL_IF,train,$(TRAIN_CONFIG))  ## Estimate the steps, memory, disk and time of a training run
	$(MAIN) plan --config-name $(TRAIN_CONFIG) $(OVERRIDES)

train: $(READY) $(call MODEL_IF,train,$(TRAIN_CONFIG))  ## Fine-tune a model: make train lr=1e-4 method=qlora
	$(MAIN) train --config-name $(TRAIN_CONFIG) $(OVERRIDES)

eval: $(READY)  ## Evaluate the newest finished run and compare it with its base
	$(MAIN) eval --config-name $(EVAL_CONFIG) $(OVERRIDES)

eval-baseline: $(READY) $(call MODEL_IF,eval_baseline,$(BASELINE_CONFIG))  ## Evaluate the base model
	$(MAIN) eval-baseline --config-name $(BASELINE_CONFIG) $(OVERRIDES)

compare: $(READY)  ## Compare two evaluated runs, or a run with its base: make compare A=RUN B=RUN|baseline
	$(MAIN) compare --config-name $(COMPARE_CONFIG) $(foreach w,$(A) $(B),'$(w)') $(OVERRIDES)

report: $(READY)  ## Write the report.html of a run: make report model_path=RUN (default: the newest)
	$(MAIN) report --config-name $(REPORT_CONFIG) $(OVERRIDES)

validate: $(READY)  ## Check that the files of a run are complete and its model works: make validate model_path=RUN
	$(MAIN) validate --config-name $(VALIDATE_CONFIG) $(OVERRIDES)

publish: $(READY)  ## Publish a model that beats its base to artifacts/models, or with target=hub to the Hub
	$(MAIN) publish --config-name $(PUBLISH_CONFIG) $(OVERRIDES)

publish-hf: $(READY)  ## Publish a model that beats its base to the Hugging Face Hub
	$(MAIN) publish-hf --config-name $(PUBLISH_CONFIG) $(OVERRIDES)

runs: $(READY)  ## List the runs with scores and verdicts: make runs ARGS='--sort test/rougeL', ARGS='diff RUN RUN'
	@$(MAIN) runs $(ARGS)

demo: $(READY) $(DEMO)  ## Run the full pipeline on a small model: train, evaluate, compare, publish
	$(MAIN) train $(OVERRIDES)
	$(MAIN) eval $(call ONLY,output_dir artifacts_dir bf16 cuda_visible_devices)
	$(MAIN) publish $(call ONLY,output_dir artifacts_dir cuda_visible_devices)

push: $(READY)  ## Sync the code to REMOTE_DIR on REMOTE_HOST; ALSO=paths that git ignores
	$(MAIN) push $(call flag,--also,ALSO)

ssh-init: $(READY)  ## Show the server's hardware, and install or complete its Python environment
	$(MAIN) ssh-init

$(SSH_TRAIN) $(SSH_PUBLISH) $(SSH_OTHERS): ssh-%: $(READY)
	$(MAIN) $@ --config-name $(CONFIG) $(STARTED) $(if $(filter compare,$*),$(foreach w,$(A) $(B),'$(w)')) $(OVERRIDES)

ssh-data-push: $(READY)
	$(MAIN) ssh-data-push $(STARTED) $(if $(MESSAGE),'message=$${oc.env:MESSAGE}') $(OVERRIDES)

ssh-train:  ## Train on the server: make ssh-train lr=1e-4 DETACH=1
ssh-eval:  ## Evaluate on the server
ssh-eval-baseline:  ## Evaluate the base model on the server
ssh-check-data:  ## Check training data on the server: accepted and rejected rows
ssh-plan:  ## Estimate a training run on the server
ssh-compare:  ## Compare runs on the server: make ssh-compare A=RUN B=RUN
ssh-report:  ## Write the report.html of a run on the server
ssh-validate:  ## Validate a run on the server
ssh-publish:  ## Publish to artifacts/models on the server
ssh-publish-hf:  ## Publish to the Hugging Face Hub from the server
ssh-data-push:  ## Commit a folder on the server to lakeFS

ssh-status: $(READY)  ## List the runs on the server; ALL=1 lists all
	@$(MAIN) ssh-status $(call bare,--all,ALL)

ssh-logs: $(READY)  ## Print the log of a run on the server: make ssh-logs RUN=id (default: newest run)
	@$(MAIN) ssh-logs $(run)

ssh-attach: $(READY)  ## Follow the log of a run on the server; Ctrl-C does not stop the run
	@$(MAIN) ssh-attach $(run)

ssh-stop: $(READY)  ## Save a checkpoint of a run on the server and stop it: make ssh-stop RUN=id GRACE=seconds
	@$(MAIN) ssh-stop $(call flag,--grace,GRACE) $(run)

ssh-fetch: $(READY)  ## Download a run from the server and verify every file: make ssh-fetch RUN=id
	@$(MAIN) ssh-fetch $(run)

ssh-shell: $(READY)  ## Open a shell in the server's folder
	@$(MAIN) ssh-shell

ssh-tensorboard: $(READY)  ## Show the server's TensorBoard at http://localhost:6006, or PORT=n
	@$(MAIN) ssh-tensorboard $(call flag,--port,PORT)

test: $(READY_DEV) lint  ## Run all checks: lint, types, tests (no GPU, no Hub)
	$(PY) -m pytest -n auto --dist worksteal $(ARGS)

lint: $(READY_DEV)  ## Check style and types
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: $(READY_DEV)  ## Format the code
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

docs: $(READY_DOCS)  ## Build the documentation site in site/; a broken link or anchor fails
	$(PY) -m zensical build --clean --strict

clean:  ## Remove caches, and outputs/ after asking (YES=1: without asking)
	@$(PYTHON) scripts/clean.py $(if $(filter 1,$(YES)),--yes)

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: requirements.txt | $(VENV)/bin/python
	$(VENV)/bin/pip install --disable-pip-version-check $(shell grep '^torch==' requirements.txt)
	$(VENV)/bin/pip install --disable-pip-version-check -r requirements.txt
	@touch $@

$(VENV)/.installed-dev: requirements-dev.txt $(VENV)/.installed
	$(VENV)/bin/pip install --disable-pip-version-check -r requirements-dev.txt
	@touch $@

$(VENV)/.installed-docs: requirements-docs.txt | $(VENV)/bin/python
	$(VENV)/bin/pip install --disable-pip-version-check -r requirements-docs.txt
	@touch $@

$(DEMO): | $(READY)  # order-only: an existing folder is kept whatever its time stamp
	$(PY) scripts/build_demo_model.py

models/tiny-random-%/config.json: | $(READY)
	$(PY) scripts/build_demo_model.py --tiny $*
