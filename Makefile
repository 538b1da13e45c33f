# `make demo` describes the bundled picture, `make test` runs the tests; both set up .venv first and
# reuse it afterwards. PYTHON names another interpreter (3.11 or later).
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
NVCC ?= $(or $(shell command -v nvcc 2>/dev/null),$(wildcard /usr/local/cuda/bin/nvcc),nvcc)
export NVCC

# What `make demo` builds the kernels for: the GPUs here, of those that csrc/ is written for.
GPUS = $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | tr -d .)
ARCHS = $(sort $(patsubst 90,90a,$(filter 80 86 89 90,$(GPUS))))
KERNELS := llava_engine/_kernels.so

.PHONY: demo test check csrc bench fuzz soak clean

demo: $(VENV)/.installed
	@archs='$(ARCHS)'; if [ -n "$$archs" ] && [ ! -e $(KERNELS) ] && command -v $(NVCC) >/dev/null; then \
	  echo "Building the CUDA kernels for this GPU ($$archs); this can take some minutes."; \
	  LLAVA_CUDA_ARCHS="$${LLAVA_CUDA_ARCHS:-$$archs}" $(BIN)/python setup.py --quiet build_csrc || \
	    echo 'They could not be built: the demo runs on the CPU.'; fi
	$(BIN)/llava-engine describe

test: $(VENV)/.installed-test
	$(BIN)/pytest

check: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The CUDA kernels, where nvcc is; LLAVA_CUDA_ARCHS names the GPUs ("90a" by default).
csrc: $(VENV)/.installed
	$(BIN)/python setup.py --quiet build_csrc

# What can be measured on a CPU with llava-tiny; bench/gpu.sh is for a machine with a GPU.
bench: $(VENV)/.installed-test
	$(BIN)/python -m pytest bench/test_cpu.py -q --benchmark-columns=median,min,max,rounds
	$(BIN)/python -m bench.prefill --device cpu
	$(BIN)/python -m bench.interference --device cpu --threads 0 2 --requests 1
	$(BIN)/python bench/scheduler.py
	$(BIN)/python bench/serving.py --device cpu --concurrency 1,4

# 10,000 mutated pictures: only ImageErrors, each in bounded time and memory.
fuzz: $(VENV)/.installed-test
	$(BIN)/python bench/fuzz.py

# Good, bad, slow and cancelled requests for so long: nothing may grow, hang or end wrongly.
MINUTES ?= 10
soak: $(VENV)/.installed-test
	$(BIN)/python -m bench.soak --minutes $(MINUTES) --json bench/results/soak.json

clean:
	rm -rf $(VENV) build *.egg-info

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "llava_engine needs Python 3.11 or later")'
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -qq --upgrade pip
	@touch $@

# The editable install sees changed sources by itself; only these files make it stale.
$(VENV)/.installed: $(VENV)/.created pyproject.toml setup.py constraints.txt
	@echo 'Installing llava_engine and torch into $(VENV); this can take some minutes.'
	@$(BIN)/python -m pip install -qq --constraint constraints.txt --editable .
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	@echo 'Installing what the tests need into $(VENV).'
	@$(BIN)/python -m pip install -qq --constraint constraints.txt --editable '.[test]'
	@touch $@
