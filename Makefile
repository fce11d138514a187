# make run    sets up .venv and serves the models on this machine (ARGS="--port 8080" passes flags on)
# make test   sets up the development tools too; ruff, mypy, pytest
# make test-models  drives clients and real models, downloaded first (1 GB); tens of minutes
# make bench  measures this machine's speed (ARGS="--json", ARGS="--url URL --model NAME")

SHELL := /bin/bash
PYTHON ?= python3
BIN := .venv/bin
ifeq ($(OS),Windows_NT)
BIN := .venv/Scripts
endif
ARGS ?=

.PHONY: run test test-models bench model model-eval clean
.DELETE_ON_ERROR:

run: .venv/.run
	@exec $(BIN)/python shimmy.py serve $(ARGS)

test: .venv/.test
	$(BIN)/ruff check shimmy.py test_shimmy.py models
	$(BIN)/mypy shimmy.py test_shimmy.py
	$(BIN)/python -m pytest -q -x -n 3 test_shimmy.py $(ARGS)

bench: .venv/.test
	@$(BIN)/python test_shimmy.py bench $(ARGS)

model: .venv/.model
	$(BIN)/python models/make_tiny.py $(ARGS)

model-eval: .venv/.test
	$(BIN)/python models/eval_tiny.py $(ARGS)

clean:
	rm -rf .venv __pycache__ models/__pycache__ models/generator/__pycache__ .pytest_cache .mypy_cache .ruff_cache models/.training

.venv/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
	  echo "shimmy needs Python 3.10 or newer, and '$(PYTHON)' is $$($(PYTHON) --version 2>&1 || echo missing)."; \
	  echo "Install one and say: make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)"; exit 1; }
	@$(PYTHON) -m venv .venv || { echo "python's venv module is missing: on Debian or Ubuntu, apt install python3-venv"; exit 1; }
	@touch $@

# llama-cpp-python is compiled here when no wheel is at hand: some six minutes, once; pip keeps the result
.venv/.run: .venv/.made
	@$(BIN)/python -m pip install -q --disable-pip-version-check 'websockets>=17' 'jinja2>=3.1.6' 'numpy' || { \
	  echo "pip could not install websockets. Is the network there?  Try: $(BIN)/python -m pip install websockets"; exit 1; }
	@echo "Installing llama-cpp-python (compiled on the first time: about six minutes) ..."
	@$(BIN)/python -m pip install -q --disable-pip-version-check 'llama-cpp-python==0.3.36' || { \
	  command -v cc >/dev/null || command -v gcc >/dev/null || command -v clang >/dev/null || \
	    echo "No C compiler was found: apt install build-essential, or xcode-select --install, and try again."; \
	  echo "llama-cpp-python could not be installed; pip's words are above. It needs a C++ compiler and the network."; exit 1; }
	@touch $@

.venv/.test: .venv/.run
	@$(BIN)/python -m pip install -q --disable-pip-version-check pytest pytest-xdist openai httpx gguf ruff mypy || { \
	  echo "pip could not install the development tools. Is the network there?"; exit 1; }
	@touch $@

.venv/.model: .venv/.test
	@$(BIN)/python -m pip install -q --disable-pip-version-check torch==2.13.0 tokenizers || { \
	  echo "pip could not install torch and tokenizers. Is the network there?"; exit 1; }
	@touch $@
