# `make help` lists the targets. Each does all its own set-up.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
LOCAL := $(VENV)/.installed-local
PROTO_FILES = $(shell find protos -name '*.proto')
ARGS ?=
# Contracts are compared with main's, or on main itself with the commit before.
PROTO_BASE = $(shell git diff --quiet main HEAD 2>/dev/null && git rev-parse HEAD~1 || git rev-parse main)

.DEFAULT_GOAL := help
.PHONY: help demo up test postgres test-export test-fast lint proto proto-check chart chart-check images bench bench-generate soak soak-restart soak-rollouts soak-outage memory format clean

help: ## List the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# What serves on one machine, and what development needs besides.
$(LOCAL) $(STAMP): $(BIN)/python pyproject.toml constraints.txt
	@echo "Installing into $(VENV), once: a minute or three, by what has to be fetched ..."
	$(BIN)/pip install --disable-pip-version-check --constraint constraints.txt \
	  --editable '.[$(if $(filter $(LOCAL),$@),local,dev)]'
	touch $@

demo: $(LOCAL) ## Start the three services, push the sample model, send requests, stop
	$(BIN)/modelfleet demo

up: $(LOCAL) ## Start the three services and serve until Ctrl-C
	$(BIN)/modelfleet up $(ARGS)

test: lint proto-check chart-check postgres ## Every check but those that need torch
	$(BIN)/pytest --numprocesses=auto --dist=loadscope --max-worker-restart=0 $(ARGS)

# For the tests of the manager's database, which start a server of their own; they are skipped where this cannot be.
postgres:
	@ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1 || command -v initdb >/dev/null || \
	  { test "$$(id -u)" = 0 && apt-get update -qq && apt-get install -y -qq --no-install-recommends postgresql; } || \
	  echo "Tests on PostgreSQL will be skipped: install it with 'apt-get install postgresql'."

# torch takes a gigabyte, which `make test` does without.
test-export: $(STAMP) ## The tests of exports, training and generated text, with torch
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[export]'
	$(BIN)/modelfleet samples fetch smollm2
	$(BIN)/pytest -m export $(ARGS)

test-fast: $(STAMP) ## The tests that take seconds
	$(BIN)/pytest -m 'not slow' $(ARGS)

lint: $(STAMP) ## ruff, mypy, buf
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	cd protos && ../$(BIN)/buf lint && ../$(BIN)/buf format --diff --exit-code

format: $(STAMP) ## Format Python and protos
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	cd protos && ../$(BIN)/buf format --write

proto: $(STAMP) ## Generate the stubs in services/modelfleet/api from protos/
	find services/modelfleet/api -name '*_pb2*' -delete 2>/dev/null || true
	$(call generate,services)

proto-check: $(STAMP) ## Stubs are fresh, and no contract of main is broken
	rm -rf .cache/stubs && mkdir -p .cache/stubs
	$(call generate,.cache/stubs)
	diff -r -x __pycache__ .cache/stubs/modelfleet/api services/modelfleet/api
	$(BIN)/buf breaking protos --against '.git#ref=$(PROTO_BASE),subdir=protos'

# Run from the virtual environment so that protoc finds the mypy plugins there.
define generate
	PATH="$(BIN):$$PATH" $(BIN)/python -m grpc_tools.protoc --proto_path=protos \
	  --python_out=$(1) --grpc_python_out=$(1) --mypy_out=quiet:$(1) --mypy_grpc_out=quiet:$(1) $(PROTO_FILES)
endef

chart: $(STAMP) ## Write the chart's schema and README from the comments of its values
	$(BIN)/python deploy/helm/document.py

chart-check: $(STAMP)
	$(BIN)/python deploy/helm/document.py --check

images: $(STAMP) ## Build the four images and serve a model from them; skipped without a Docker engine
	$(BIN)/python tests/e2e/images.py $(ARGS)

bench: $(STAMP) ## Measure against a bare ONNX Runtime loop; JSON=FILE also writes the figures
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[export]'
	$(BIN)/python -m modelfleet_tools.bars $(if $(JSON),--json-file $(JSON)) $(ARGS)

bench-generate: $(STAMP) ## Measure generated text against the bare engine; JSON=FILE also writes the figures
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[export]'
	$(BIN)/python -m modelfleet_tools.bars.generation $(if $(JSON),--json-file $(JSON)) $(ARGS)

soak: $(STAMP) ## Ten minutes of load while each service in turn is killed with -9
	PYTHONPATH=tests $(BIN)/python -m load.kill_services $(ARGS)

soak-restart: $(STAMP) ## Restart every replica of every service in turn, under load
	PYTHONPATH=tests $(BIN)/python -m load.rolling_restart $(ARGS)

soak-outage: $(STAMP) ## Five minutes without a manager, under load
	PYTHONPATH=tests $(BIN)/python -m load.manager_outage $(ARGS)

memory: $(STAMP) ## What sessions take of memory, and what unloading gives back
	$(BIN)/python tests/load/session_memory.py $(ARGS)

soak-rollouts: $(STAMP) ## 20 rollouts and 5 aborted ones under load on two workers: no request may fail
	$(BIN)/python tests/load/rollouts.py $(ARGS)

clean: ## Remove what the targets made
	rm -rf $(VENV) .cache
