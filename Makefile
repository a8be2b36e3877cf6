# Two targets do all the set-up: `make quickstart` and `make test`.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed-
JOBS ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal

.PHONY: quickstart test test-fast lint bench install clean

quickstart: $(STAMP)base ## text to a trained model that talks, in about four minutes
	$(BIN)/cordee quickstart $(ARGS)

test: $(STAMP)test ## all tests, in JOBS processes
	$(PYTEST) $(ARGS)

test-fast: $(STAMP)test ## the tests that take less than three minutes together
	$(PYTEST) -m "not slow" $(ARGS)

lint: $(STAMP)dev $(STAMP)test ## style, types and import layers
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/pyright
	$(BIN)/lint-imports

bench: $(STAMP)bench ## the figures of docs/benchmarks.md
	$(BIN)/cordee bench train $(ARGS)

install: $(STAMP)base ## the environment alone

$(STAMP)base: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e .
	touch $@

# An extra is installed on top of the base, whose torch is not touched again.
$(STAMP)%: $(STAMP)base
	$(BIN)/python -m pip install --quiet -e ".[$*]"
	touch $@

clean:
	rm -rf $(VENV) build dist src/*.egg-info quickstart-run
