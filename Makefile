# `make demo` and `make test` install what they need, from requirements.lock, into .venv.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help install demo test test-fast bench-data bench-score bench-pretraining bench-sizes lint format lock clean

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

install: $(VENV)/.installed ## .venv from the lock file, with this package in it

$(VENV)/.installed: requirements.lock pyproject.toml
	@test -n "$(PYTHON)" && $(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' \
		|| { echo "bp-spark needs Python 3.11: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-compile --require-hashes -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	# a bare spark-submit of this environment reads conf/
	ln -sfn $(CURDIR)/conf $$($(BIN)/python -c 'import pathlib, pyspark; print(pathlib.Path(pyspark.__file__).parent / "conf")')
	@touch $@

demo: install ## the whole line on real data: features, training, metrics, scores
	$(BIN)/bp-spark demo

test: lint ## lint, types, import contract, all tests
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-fast: install ## all but the heavy tests
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m 'not slow'

bench-data: install ## the data half against DuckDB, growth, a new day, dirt: JSON to standard output
	$(BIN)/python -m bench.data

bench-score: install ## the nightly pass against plain torch and other ways, growth, nights with few changes: JSON to standard output
	$(BIN)/python -m bench.score

bench-pretraining: demo ## the transformer with and without pre-training, by share of labels used: JSON to standard output
	$(BIN)/python -m bench.pretraining --config conf/demo.yaml pretraining.max_epochs=60

bench-sizes: install ## weights and milliseconds of the network in each size, on one thread: JSON to standard output
	$(BIN)/python -m bench.sizes

lint: install ## ruff, mypy, import contract
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: install ## apply ruff's format and fixes
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lock: ## resolve requirements.lock anew (needs uv)
	uv pip compile --quiet --python-version 3.11 --all-extras --generate-hashes --no-emit-index-url \
		--custom-compile-command "make lock" pyproject.toml --output-file requirements.lock

clean: ## remove what the demo wrote
	rm -rf demo
