# Assay. `make` alone lists the commands. Any setting is overridden on the command line, as in
#   make train lr=1e-4 method=qlora
# and what make cannot take as NAME=VALUE goes through ARGS='...', as in
#   make train ARGS='--multirun lr=1e-4,1e-3'
# scripts/target.py reads these words, refuses those that it does not know, and runs the target.

SHELL := /bin/bash
.DEFAULT_GOAL := help

VENV ?= .venv
PYTHON ?= python3

# `make train PY=python` uses that Python and installs nothing.
PY ?= $(VENV)/bin/python
READY := $(if $(filter file,$(origin PY)),$(VENV)/.installed)
READY_DEV := $(if $(filter file,$(origin PY)),$(VENV)/.installed-dev)
READY_DOCS := $(if $(filter file,$(origin PY)),$(VENV)/.installed-docs)

ifeq ($(wildcard scripts/target.py),)
$(error $(CURDIR) is not the folder of Assay; run make in it, or make -C FOLDER)
endif

# CHECK refuses unknown names before anything is installed; ASSAY does so too, and then runs the target.
FIRST := $(if $(READY),$(or $(wildcard $(VENV)/bin/python),$(PYTHON)),$(PY))
CHECK := +@$(FIRST) scripts/target.py '$(subst ','\'',$(MAKECMDGOALS))'
ASSAY = $(CHECK) $@ $(PY)

# make expands what it exports, so that run_name='$(shell ...)' would run a command: target.py reads MAKEFLAGS instead.
$(foreach name,$(.VARIABLES),$(if $(filter command,$(origin $(name))),$(if $(findstring $$,$(value $(name))),$(eval unexport $(name)))))

STAGES := check-data plan train eval eval-baseline compare report validate publish publish-hf data-push
COMMANDS := $(STAGES) runs list-configs demo convert model tiny-model \
	push ssh-init ssh-status ssh-logs ssh-attach ssh-stop ssh-fetch ssh-shell ssh-tensorboard $(STAGES:%=ssh-%)
.NOTPARALLEL:  # with -j, train and eval would run at once
.PHONY: help venv install $(COMMANDS) test lint format docs clean

help:  ## List these commands
	$(if $(MAKEOVERRIDES),$(CHECK),@:)
	@echo "Assay: fine-tune a language model, prove that it is better, publish it."
	@echo
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-18s", $$1; column = 25; words = split($$2, word, " "); \
		for (i = 1; i <= words; i++) { if (column + length(word[i]) > 78) { printf "\n%25s", ""; column = 25 } \
		printf " %s", word[i]; column += length(word[i]) + 1 } print "" }' $(MAKEFILE_LIST)
	@echo
	@echo "make train ARGS=--help lists the settings of a command, make list-configs the presets."

$(COMMANDS): $(READY)
	$(ASSAY)

check-data:  ## Show which rows a training run would use, and which not and why
plan:  ## Estimate the steps, memory, disk and time of a training run
train:  ## Fine-tune a model: make train lr=1e-4 method=qlora
eval:  ## Evaluate a run and compare it with its base: make eval RUN=id (default: the newest finished run)
eval-baseline:  ## Evaluate the base model
compare:  ## Compare two evaluated runs, or a run with its base: make compare A=RUN B=RUN|baseline
report:  ## Write the report.html of a run: make report RUN=id (default: the newest)
validate:  ## Check that the files of a run are complete and its model works: make validate RUN=id
publish:  ## Publish a model that beats its base to artifacts/models, or with target=hub to the Hub
publish-hf:  ## Publish a model that beats its base to the Hugging Face Hub: make publish-hf RUN=id
runs:  ## List the runs with scores and verdicts: make runs ARGS='--sort test/rougeL', make runs A=RUN B=RUN
list-configs:  ## List the configuration files and presets
convert:  ## Convert multi-line JSON, ChatGPT and Claude exports under data/ to JSONL
data-push:  ## Commit a folder to lakeFS: make data-push MESSAGE="what is new" data_source.repo=NAME
demo:  ## Run the full pipeline on a small model: train, evaluate, compare, publish
model:  ## Build the demo's base model, SmolLM2-135M-Instruct, without the Hub
tiny-model:  ## Build the tiny random model of experiment=smoke

push:  ## Sync the code to REMOTE_DIR on REMOTE_HOST; ALSO=paths that git ignores
ssh-init:  ## Show the server's hardware, and install or complete its Python environment
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
ssh-status:  ## List the runs on the server; ALL=1 lists all
ssh-logs:  ## Print the log of a run on the server: make ssh-logs RUN=id (default: newest run)
ssh-attach:  ## Follow the log of a run on the server; Ctrl-C does not stop the run
ssh-stop:  ## Save a checkpoint of a run on the server and stop it: make ssh-stop RUN=id GRACE=seconds
ssh-fetch:  ## Download a run from the server and verify every file: make ssh-fetch RUN=id
ssh-shell:  ## Open a shell in the server's folder
ssh-tensorboard:  ## Show the server's TensorBoard at http://localhost:6006, or PORT=n

test: $(READY_DEV)  ## Run all checks: lint, types, tests (no GPU, no Hub)
	$(ASSAY)

lint: $(READY_DEV)  ## Check style and types
	$(CHECK)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: $(READY_DEV)  ## Format the code
	$(CHECK)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

docs: $(READY_DOCS)  ## Build the documentation site in site/; a broken link or anchor fails
	$(CHECK)
	$(PY) -m zensical build --clean --strict

# A word that is no command: CHECK refuses it, before or after the others.
.DEFAULT:
	$(CHECK)

clean:  ## Remove caches, and outputs/ after asking (YES=1: without asking)
	$(CHECK) $@ $(FIRST)

venv: $(VENV)/bin/python  ## Create the virtual environment in .venv
	$(CHECK)

install: $(VENV)/.installed  ## Install the pinned dependencies into .venv (torch first)
	$(CHECK)

$(VENV)/bin/python:
	$(CHECK)
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: requirements.txt | $(VENV)/bin/python
	$(CHECK)
	$(VENV)/bin/pip install --disable-pip-version-check $(shell grep '^torch==' requirements.txt)
	$(VENV)/bin/pip install --disable-pip-version-check -r requirements.txt
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
$(VENV)/.installed-%: requirements-%.txt | $(VENV)/bin/python
	$(VENV)/bin/pip install --disable-pip-version-check -r requirements-$*.txt
	@touch $@
