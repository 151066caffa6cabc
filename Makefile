# Needs make, git and a Python 3.11 or later with venv. `make demo` and `make test` set up what they need.

BIN := .venv/bin
STAMP := .venv/.complete
# What the GPU's targets run with: ours, set up as the others need it, unless another is named.
READY := $(if $(PY),,$(STAMP))
PY := $(if $(PY),$(PY),$(BIN)/python)
# Every memory of its own, so that the checker sees its end; every kernel, few shapes.
SANITIZED := distinct or prefill or gate or norms or rotary or 600-None-16 or attention and 128
SANITIZE = PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --error-exitcode 1 --target-processes all
export DEMO_PROMPT := $(value PROMPT)

.PHONY: setup demo test test-gpu bench-gpu sanitize-gpu check lint types proto bench clean

# make setup CUDA=1: torch's default build and the CUDA extra.
setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt deploy/setup.sh $(wildcard kernels/lora_tables.cuh kernels/native/*)
	@CUDA=$(CUDA) sh deploy/setup.sh

ifeq ($(CUDA),1)
ifneq ($(shell cat $(STAMP) 2>/dev/null),cuda)
.PHONY: $(STAMP)
endif
endif

# make demo PROMPT='your own'
demo: $(STAMP)
	@$(BIN)/loraplex demo $${DEMO_PROMPT:+--prompt="$$DEMO_PROMPT"}

test: $(STAMP)
	$(BIN)/pytest -m "not gpu" -n auto --maxprocesses 4 --dist loadfile

# On a machine that has its own environment: make test-gpu PY=python3
test-gpu: $(READY)
	$(PY) -m pytest -m gpu tests/gpu

# The tables of bench/RESULTS.md; about two minutes.
bench-gpu: $(READY)
	$(PY) -m bench.gpu --json bench-gpu.json

# A few tests of every kernel under the checkers of memory and of races.
sanitize-gpu: $(READY)
	$(SANITIZE) --tool memcheck $(PY) -m pytest -q -m gpu tests/gpu -k "bfloat16 and ($(SANITIZED))"
	$(SANITIZE) --tool racecheck $(PY) -m pytest -q -m gpu tests/gpu -k "bfloat16 and ($(SANITIZED))"

check: lint types

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

# Regenerate the committed gRPC stubs.
proto: $(STAMP)
	sh deploy/proto.sh $(BIN)/python .

bench: $(STAMP)
	$(BIN)/python -m bench.lora_cpu
	$(BIN)/python -m bench.router_cost

# Remove everything that this file makes, the environments included.
clean:
	rm -rf .venv .venv-proto build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
