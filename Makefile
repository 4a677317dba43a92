# convline: `make train export` is the main job; `make help` lists the rest.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin

RECIPE  ?= $(if $(SOURCE),photos,digits)
RUN     ?= $(basename $(notdir $(RECIPE)))
DATASET ?=
SOURCE  ?=
SIZE    ?=
STEPS   ?=
IMAGES  ?=
MODEL   ?= runs/$(RUN)/model.onnx
OUTPUT  ?= runs/$(RUN)/predictions.csv
ARGS    ?=

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help setup data train evaluate export parity report classify bench ui test test-all test-slow check fix clean

help: ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14
	@echo "variables: RECIPE DATASET SOURCE SIZE RUN STEPS IMAGES MODEL OUTPUT, as in: make train export RECIPE=simple-convnet"

setup: $(VENV)/.installed ## create .venv with everything that training needs

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "convline needs Python 3.11 or newer; $(PYTHON) is older: make PYTHON=python3.12 …" >&2; exit 1; }
	@echo "setting up $(VENV): PyTorch and the rest are several gigabytes, this takes minutes" >&2
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[train,dev]'
	@touch $@

data: setup ## prepare DATASET (from SOURCE, a folder or archive of your own images, resized to SIZE or for RECIPE)
	@test -z "$(SOURCE)" -o -n "$(DATASET)" || { echo "give the images of SOURCE a name: DATASET=pets" >&2; exit 2; }
	@if [ -e data/$(or $(DATASET),digits)/meta.json ]; then echo "data/$(or $(DATASET),digits) is prepared"; \
	else $(BIN)/pipeline preprocess $(or $(DATASET),digits) $(if $(SOURCE),--source "$(SOURCE)") $(if $(SIZE),--image-size $(SIZE),--recipe $(RECIPE)); fi

train: setup $(if $(SOURCE),data) ## train RECIPE into runs/RUN, going on where it was
	$(BIN)/pipeline train $(RECIPE) --run $(RUN) --resume $(if $(DATASET),--dataset $(DATASET)) $(if $(STEPS),--steps $(STEPS))

evaluate: setup ## print precision @ 1 of RUN on test
	@$(BIN)/pipeline evaluate $(RUN) --precision-at-1

export: setup ## export RUN to ONNX and prove it; nothing to do where it is newer than the checkpoints
	@if [ -e runs/$(RUN)/model.onnx ] && [ -z "$$(find runs/$(RUN)/checkpoints -newer runs/$(RUN)/model.onnx -name '*.pt')" ]; \
	then echo "runs/$(RUN)/model.onnx is up to date"; else $(BIN)/pipeline export $(RUN); fi

parity: setup ## prove MODEL against its checkpoint again
	@$(BIN)/pipeline parity $(MODEL)

report: setup ## write report.html of RUN: curves, mistakes, filters, layers, parity
	@$(BIN)/pipeline report $(RUN)

classify: setup ## classify the folder IMAGES with MODEL into OUTPUT
	@test -n "$(IMAGES)" || { echo "say which images: make classify IMAGES=folder" >&2; exit 2; }
	$(BIN)/serving classify "$(IMAGES)" --model $(MODEL) --output $(OUTPUT) --overwrite

bench: setup ## measure how fast MODEL classifies on this machine, on IMAGES if there are some
	@$(BIN)/serving bench $(MODEL) $(if $(IMAGES),--images "$(IMAGES)")

ui: setup ## open MLflow on http://127.0.0.1:5000
	@echo "the runs, the best first: http://127.0.0.1:5000/#/experiments/1/runs?viewStateShareKey=convline"
	$(BIN)/mlflow ui --backend-store-uri sqlite:///mlflow.db --host 127.0.0.1 --port 5000

PYTEST := $(BIN)/python -m pytest --durations 25
PARALLEL := --numprocesses auto --maxprocesses 4 --dist worksteal

test: setup ## run the tests that every change must pass: minutes; ARGS="-k name" for some of them
	$(PYTEST) -m "not all and not slow" $(PARALLEL) $(ARGS)

test-all: setup ## run the tests that `make test` leaves out: kills, servers, clusters, whole jobs
	$(PYTEST) -m "all and not slow" $(PARALLEL) $(ARGS)

test-slow: setup ## run the tests that take longest, one after the other
	$(PYTEST) -m slow $(ARGS)

check: setup ## lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

fix: setup ## mend lint and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove caches; data, runs and .venv stay
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
