# Every target with a line each: make help

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup demo bench bench-train test test-oldest test-extras check format train prealign align sft search doctor eval release chat web clean

VENV := .venv
BIN := $(VENV)/bin
EXTRAS := .venv-extras
RECIPE ?= configs/recipes/mini.yaml
ARGS ?=

help:  ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  %-12s %s\n", $$1, $$2}'
	@echo
	@echo '  ARGS="..." is handed on: to train targets as key=value, to test and eval as options.'

# ---- set up ------------------------------------------------------------------------------------

# A Python that is new enough; PYTHON=... overrides. Looked for only when the environment is made.
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11; do \
  $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
  && echo $$python && break; done)

setup: $(VENV)/installed  ## .venv with everything that training, tests and the demo need

$(VENV)/installed: pyproject.toml constraints.txt
	@[ -n "$(PYTHON)" ] || { echo 'No Python >= 3.11 found. Install one, or: make setup PYTHON=/path/to/python'; exit 1; }
	[ -x $(BIN)/pip ] || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[dev]'
	@touch $@

# ---- see it work -------------------------------------------------------------------------------

demo: setup  ## data, experts, three stages, scores, report, in minutes on a CPU (DEMO=smoke: tiny)
	$(BIN)/python -m train.demo $(DEMO) $(ARGS)

chat: setup  ## ask about a picture: make chat MODEL=runs/... IMAGE=picture.png
	$(BIN)/eagle-moe chat --model $(call given,MODEL) --image $(call given,IMAGE) $(ARGS)

web: $(EXTRAS)/installed  ## the same in a browser, with experts switched off: make web MODEL=runs/... [EXAMPLES=suite]
	$(EXTRAS)/bin/python $(BIN)/eagle-moe web --model $(call given,MODEL) $(if $(EXAMPLES),--examples $(EXAMPLES)) $(ARGS)

# ---- work --------------------------------------------------------------------------------------

train: setup  ## all stages of a recipe: make train RECIPE=configs/recipes/mini.yaml
	$(BIN)/python -m train.run $(RECIPE) $(ARGS)

prealign: setup  ## its stage pre_align: every expert with a connector of its own, LLM frozen
	$(BIN)/python -m train.run $(RECIPE) --stage pre_align $(ARGS)

align: setup  ## its stage align: the connector of the mixture
	$(BIN)/python -m train.run $(RECIPE) --stage align $(ARGS)

sft: setup  ## its stage sft: supervised fine-tuning
	$(BIN)/python -m train.run $(RECIPE) --stage sft $(ARGS)

SEARCH ?= configs/search/mini.yaml

search: setup  ## which experts to mix: make search SEARCH=configs/search/mini.yaml [OUT=dir]
	$(BIN)/python -m train.search $(SEARCH) $(if $(OUT),--out $(OUT)) $(ARGS)

doctor: setup  ## examine the data of a recipe before training on it
	$(BIN)/python -m train.data.doctor --recipe $(RECIPE) $(ARGS)

eval: setup  ## scores with intervals: make eval MODEL=runs/... [TASKS=skills|paper|a,b] [DATA=folder]
	$(BIN)/python -m eval.run --model $(call given,MODEL) --tasks $(or $(TASKS),skills) \
	  $(if $(DATA),--data $(DATA)) --out $(or $(OUT),$(MODEL)/eval) $(ARGS)

release: setup  ## a folder for the Hub, checked: make release MODEL=runs/... TO=owner/name [ARGS=--push]
	$(BIN)/eagle-moe release $(call given,MODEL) --to $(call given,TO) $(ARGS)

given = $(or $($(1)),$(error say $(1)=... (see make help)))

# ---- measure -----------------------------------------------------------------------------------

bench-train: setup  ## packing, loss head, loader, records: ratios side by side (docs/benchmarks.md)
	OMP_NUM_THREADS=1 $(BIN)/python -m train.bench $(ARGS)

bench: bench-train  ## that, and what a second question about an image costs; needs make demo
	OMP_NUM_THREADS=1 $(BIN)/python -m eval.speed.turns $(ARGS)

# ---- check -------------------------------------------------------------------------------------

# Every process of pytest imports torch and transformers (about 1 GB each), hence a bound.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 8 --dist worksteal

test: setup  ## all tests, on every core
	$(PYTEST) $(ARGS)

check: setup  ## format, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: setup  ## write the format that check asks for
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# transformers 5.19 is what serving engines pin. Its environment sees the packages of .venv behind
# its own, so that torch is not installed twice.
OLDEST := .venv-oldest
OLDEST_TESTS = $(wildcard $(addprefix tests/test_,$(addsuffix .py,\
  auto build canvas chat* cli config connectors expert* fusion golden* image_processor interop* limits \
  model* processor profile serv*)))

site = $(1)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'

# A new environment $(1) that sees the packages of .venv behind its own.
define in-front
rm -rf $(1)
$(BIN)/python -m venv $(1)
echo "import site; site.addsitedir('$$($(call site,$(BIN)))')" > "$$($(call site,$(1)/bin))/venv.pth"
endef

test-oldest: $(OLDEST)/installed  ## the model tests on the oldest transformers that engines pin
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest -n logical --maxprocesses 8 $(OLDEST_TESTS) $(ARGS)

$(OLDEST)/installed: $(VENV)/installed
	$(call in-front,$(OLDEST))
	$(OLDEST)/bin/python -m pip install --quiet 'transformers==5.19.*'
	@touch $@

# Packages that contradict the pins of .venv, in an environment in front of it as above.
EXTRAS_TESTS = $(wildcard tests/test_web*.py tests/test_quant*.py)

test-extras: $(EXTRAS)/installed  ## the tests of the web chat and of 8- and 4-bit weights
	OMP_NUM_THREADS=1 $(EXTRAS)/bin/python -m pytest -n logical --maxprocesses 8 $(EXTRAS_TESTS) $(ARGS)

$(EXTRAS)/installed: $(VENV)/installed
	$(call in-front,$(EXTRAS))
	$(EXTRAS)/bin/python -m pip install --quiet --constraint <(grep -v '^pillow==' constraints.txt) 'eagle-moe[dev-extras]'
	@touch $@

clean:  ## remove the environments and caches (runs/ stays)
	rm -rf $(VENV) $(OLDEST) $(EXTRAS) .pytest_cache .ruff_cache .mypy_cache build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
