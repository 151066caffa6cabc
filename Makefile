# Needs make, git and a Python 3.11 or later with venv. `make demo` and `make test` set up what they need.

BIN := .venv/bin
STAMP := .venv/.complete
export DEMO_PROMPT := $(value PROMPT)

.PHONY: setup demo test test-gpu check lint types proto bench clean

# make setup CUDA=1: torch's default build and the CUDA extra.
setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt deploy/setup.sh
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

test-gpu: $(STAMP)
	$(BIN)/pytest -m gpu

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
