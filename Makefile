# One target per intention; `make help` lists them.
SHELL := /bin/bash
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN := $(VENV)/bin
PROTO := protos/zserve/v1/image_generation.proto
MODEL ?= models/z-image-demo

.DEFAULT_GOAL := help
.PHONY: help setup demo export serve test test-gpu verify-gpu lint format protos \
	bench bench-serving bench-check bench-protocol bench-images clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-15s %s\n", $$1, $$2}'

# torch first and by itself: anything else that asks for it would bring the newest build. Bytecode by all cores at the
# end, where pip would use one; some files that libraries carry are of other Pythons.
$(VENV)/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --no-compile $(TORCH)
	$(BIN)/python -m pip install --quiet --no-compile --editable '.[dev]'
	$(BIN)/python -W ignore -m compileall -qq -j 0 $(VENV)/lib || true
	touch $@

setup: $(VENV)/.installed ## create the virtual environment and install everything

demo: setup ## export the demo model, serve it, draw with it: images in out/demo
	$(BIN)/python -m demo.run

export: setup ## compile the demo checkpoint into models/z-image-demo
	$(BIN)/zserve export --checkpoint demo/checkpoint --repository models --name z-image-demo --default-size 256x256

serve: export ## serve models/ until Ctrl-C
	$(BIN)/zserve serve --model-repository models

# Two processes, a file each in the order of the names, so that what compiles for minutes is begun first.
test: setup ## run the whole test suite (no GPU needed)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-gpu: setup ## run the tests that need an NVIDIA GPU
	$(BIN)/python -m pytest -m gpu tests/gpu

verify-gpu: setup ## build, check and time every engine that this machine can run: out/verify.md
	$(BIN)/zserve verify --out out/verify

lint: setup ## formatting, lint, types, and whether the generated code is fresh
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m protos.generate --check

format: setup ## format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

protos: setup ## generate the protobuf code again
	$(BIN)/python -m protos.generate

# What `make bench` records is named after the machine. Elsewhere, for example:
#   make bench HERE=h200 OPTIONS=--random-weights SIZES="1024x1024 512x512" SMALL=256x256
# Engines are built, and looked for, at the first size.
HERE ?= cpu
OPTIONS ?=
SIZES ?= 256x256 512x512
SMALL ?= 128x128
BATCHES ?= 1 4
RESULTS := benchmarks/results
BENCH := $(BIN)/zserve bench
SHAPES = $(addprefix --size ,$(SIZES) $(SMALL)) $(addprefix --batch ,$(BATCHES)) $(OPTIONS)

bench: setup ## measure engines and service on this machine: benchmarks/results, docs/benchmark-*.svg
	$(BENCH) components $(SHAPES) --output $(RESULTS)/components_$(HERE).json --plot docs/benchmark-components-$(HERE).svg
	$(BENCH) image $(addprefix --size ,$(SIZES)) $(OPTIONS) --output $(RESULTS)/image_$(HERE).json --plot docs/benchmark-image-$(HERE).svg
	$(BENCH) service --size $(firstword $(SIZES)) $(OPTIONS) --output $(RESULTS)/service_$(HERE).json --plot docs/benchmark-service-$(HERE).svg
	$(BENCH) startup --size $(firstword $(SIZES)) $(OPTIONS) --output $(RESULTS)/startup_$(HERE).json
	$(BENCH) memory --size $(firstword $(SIZES)) $(OPTIONS) --output $(RESULTS)/memory_$(HERE).json
	$(BENCH) packages $(addprefix --size ,$(SIZES)) $(OPTIONS) --output $(RESULTS)/packages_$(HERE).json

bench-serving: export ## measure scheduling, endurance and planner with the demo on the CPU
	$(BENCH) scheduling --seconds 16 --output $(RESULTS)/scheduling_cpu.json
	$(BENCH) soak --output $(RESULTS)/soak_cpu.json
	$(BENCH) planner --output $(RESULTS)/planner.json
	$(BENCH) preview --output $(RESULTS)/preview_cpu.json

bench-check: setup ## fail where 9 of 10 repetitions of a speed-up are over 10 % below the committed median
	$(BENCH) components $(SHAPES) --output build/bench-check.json
	$(BENCH) check build/bench-check.json $(RESULTS)/components_$(HERE).json || { \
		$(BENCH) components $(SHAPES) --output build/bench-check-again.json && \
		$(BENCH) check build/bench-check.json build/bench-check-again.json $(RESULTS)/components_$(HERE).json; }

# How to get both tools: python -m benchmarks.protocol --help
bench-protocol: setup ## the protocol's cost by perf_analyzer: make bench-protocol PERF_ANALYZER=path [PYTRITON=python]
	$(BENCH) protocol --perf-analyzer $(PERF_ANALYZER) $(if $(PYTRITON),--pytriton $(PYTRITON)) --model $(MODEL) \
		--output $(RESULTS)/protocol.json

bench-images: setup ## what a 1024x1024 image costs from the worker to the client, by format
	$(BENCH) image_transfer --output $(RESULTS)/image_transfer.json

clean: ## remove everything that was made
	rm -rf $(VENV) build dist *.egg-info models out .mypy_cache .ruff_cache .pytest_cache .hypothesis
