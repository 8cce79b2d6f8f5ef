# make reproduce: the whole embedded study.   make test: lint and every test.   Both make .venv first.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
PROFILE ?= embedded
BIN := .venv/bin
INSTALLED := .venv/.installed
STRIP := $(BIN)/nbstripout --keep-id --extra-keys "metadata.papermill metadata.widgets cell.metadata.papermill"
OFFLINE := HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 HF_DATASETS_OFFLINE=1

.PHONY: help reproduce test lint format lab list clean

help: ## show these lines
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' Makefile

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { echo "psnb needs Python 3.11 or newer; '$(PYTHON)' is not: try make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@echo "installing into .venv (once; some minutes, most of it PyTorch) ..."
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --progress-bar off --disable-pip-version-check -c constraints.txt -e '.[dev]' \
	  | awk '/Downloading .* MB/ || /^Installing/ || /^Successfully built/ {print "  " substr($$0, 1, 100); fflush()}'
	@touch $@

reproduce: $(INSTALLED) ## run the study (PROFILE=embedded) and say where its report is
	@$(BIN)/psnb run --profile $(PROFILE)

test: lint ## lint, then every test
	@$(OFFLINE) $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: $(INSTALLED) ## ruff, and notebooks without outputs
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(STRIP) --verify notebooks/*.ipynb

format: $(INSTALLED) ## format the sources, strip the notebooks
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .
	@$(STRIP) notebooks/*.ipynb

lab: $(INSTALLED) ## open the notebooks in JupyterLab
	@$(BIN)/jupyter lab notebooks

list: $(INSTALLED) ## what of the study is done, what the rest would cost
	@$(BIN)/psnb list --profile $(PROFILE)

clean: ## remove .venv and what tools cached; results stay
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis
