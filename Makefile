# Everything a person runs. Each target sets up what is missing into .venv first.
.DEFAULT_GOAL := help
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
UV := $(VENV)/uv/bin/uv
# A smaller build of torch (CPU only) from an index that you name: make demo TORCH_INDEX=<url>. It is remembered; an
# empty TORCH_INDEX= goes back to the locked build, which brings CUDA.
TORCH_INDEX ?= $(shell cat $(VENV)/.torch-index 2>/dev/null)
STAMP := $(VENV)/.installed$(if $(TORCH_INDEX),-torch-$(shell printf %s '$(TORCH_INDEX)' | cksum | cut -d ' ' -f 1))
LOCKED := $(if $(TORCH_INDEX),$(VENV)/torchless.lock,requirements.lock)
# On Kafka: make demo LOG=kafka (the broker of 'make kafka'), or LOG=kafka://<host>:9092
LOG ?=
LOG_URL := $(if $(filter kafka,$(LOG)),kafka://127.0.0.1:9092,$(LOG))
# On vLLM: make up SERVING=vllm, make demo SERVING=vllm
SERVING ?=
UP_ARGS := $(if $(LOG_URL),--log $(LOG_URL)) $(if $(SERVING),--serving $(SERVING)) $(ARGS)
DEMO_ARGS := $(if $(DATA),--data $(DATA)) $(UP_ARGS)

.PHONY: help install demo up kafka kafka-stop test test-fast soak check format lock bench clean

help:            ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */\t/' | expand -t 14

install: $(STAMP) ## set up .venv from requirements.lock

$(VENV)/torchless.lock: requirements.lock
	@mkdir -p $(VENV)
	@awk '/^[^ \t#]/ { keep = !/^(torch==|triton==|nvidia-|cuda-)/ } keep' requirements.lock > $@

$(STAMP): $(LOCKED) pyproject.toml sdk/pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Everloop needs Python 3.11 or later; $$($(PYTHON) --version) found. Try: make $(MAKECMDGOALS) PYTHON=python3.11"; exit 1; }
	@test -x $(UV) || { $(PYTHON) -m venv $(VENV)/uv && $(VENV)/uv/bin/pip install --quiet --disable-pip-version-check 'uv==0.13.9'; }
	@test -x $(BIN)/python || $(UV) venv --quiet --allow-existing --python $(PYTHON) $(VENV)
	@echo "Installing the locked dependencies (the first time takes a minute or more) …"
	@$(UV) pip sync --quiet --python $(BIN)/python --require-hashes $(LOCKED)
	@if [ -n "$(TORCH_INDEX)" ]; then $(UV) pip install --quiet --python $(BIN)/python --no-deps \
	  --default-index "$(TORCH_INDEX)" "$$(grep -oE '^torch==[0-9.]+' requirements.lock)"; fi
	@$(UV) pip install --quiet --python $(BIN)/python --no-deps --config-settings editable_mode=compat -e sdk -e .
	@$(BIN)/python -m compileall -q -j 0 $(VENV)/lib >/dev/null 2>&1 || true  # so that no start compiles them again
	@rm -f $(VENV)/.installed* && printf %s '$(TORCH_INDEX)' > $(VENV)/.torch-index
	@touch $@

demo: $(STAMP)   ## close the loop on real messages and show the improvement
	@$(if $(filter kafka,$(LOG)),$(BIN)/everloop kafka start)
	@$(BIN)/everloop demo $(DEMO_ARGS)

up: $(STAMP)     ## run the platform on embedded defaults, for your own agent
	@$(BIN)/everloop up $(UP_ARGS)

kafka: $(STAMP)  ## a real Kafka broker on this machine, data below .everloop/kafka
	@$(BIN)/everloop kafka start $(ARGS)

kafka-stop: $(STAMP) ## end it; its data stay
	@$(BIN)/everloop kafka stop

# Two runs side by side: the tests on a broker wait for most of their time. With ARGS: one run, of those alone.
test: $(STAMP)   ## every check and every test
	@$(MAKE) --no-print-directory check
ifneq ($(ARGS),)
	@$(BIN)/python -m pytest $(ARGS)
else
	@log=$$(mktemp); $(BIN)/python -m pytest -m kafka >$$log 2>&1 & beside=$$!; \
	trap 'kill $$beside 2>/dev/null' INT TERM; \
	$(BIN)/python -m pytest -m "not kafka"; first=$$?; wait $$beside; second=$$?; \
	echo; echo "The tests on a Kafka broker, which ran beside these:"; cat $$log; rm -f $$log; exit $$((first || second))
endif

test-fast: $(STAMP) ## the tests that start no outside component
	@$(BIN)/python -m pytest -m "not processes and not models and not ray and not mlflow and not kafka and not vllm" $(ARGS)

soak: $(STAMP)   ## a real broker frozen for 180 s, then load and rebalances for an hour: make soak [SECONDS=<n>]
	@SOAK_FROZEN_SECONDS=180 $(BIN)/python -m pytest -s tests/gateway/test_gateway_on_kafka.py -k frozen $(ARGS)
	@SOAK_SECONDS=$(or $(SECONDS),3600) $(BIN)/python -m pytest -s tests/kafka/test_kafka_soak.py $(ARGS)

check: $(STAMP)  ## format, lint, types, layers
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

format: $(STAMP) ## rewrite the sources in the project's format
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

lock: $(STAMP)   ## resolve requirements.lock anew
	@$(UV) pip compile --quiet --universal --generate-hashes --no-annotate --no-header --no-emit-package everloop \
	  --group dev pyproject.toml -o requirements.lock

bench: $(STAMP)  ## run one benchmark: make bench NAME=gateway [ARGS=--quick]
	@test -n "$(NAME)" -a -f "benchmarks/$(NAME).py" || { echo "Which one? make bench NAME=<$$(ls benchmarks/*.py | xargs -n1 basename | sed 's/.py//' | grep -v '^_' | paste -sd'|')>"; exit 2; }
	@$(BIN)/python -m benchmarks.$(NAME) $(ARGS)

clean:           ## delete what was installed and built (not .everloop, your data)
	rm -rf $(VENV) build *.egg-info sdk/*.egg-info sdk/build tests/clients/js/node_modules
