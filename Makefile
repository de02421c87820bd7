# `make demo` and `make test` install what they need, from requirements.lock, into .venv.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3.13 || command -v python3)
VENV ?= .venv
LOCK ?= requirements.lock
AUDIT_VENV ?= .venv-audit
AIRFLOW_VENV ?= .venv-airflow
BIN := $(VENV)/bin
SPARK = $$($(BIN)/python -c 'import importlib.util as u; print(u.find_spec("pyspark").submodule_search_locations[0])')
# Spark, DDP and the tests start many processes: without bytecode on disk each would compile torch and the rest anew, for 20 s.
unexport PYTHONDONTWRITEBYTECODE
# Another Python's packages and another Spark would take the place of the locked ones.
unexport PYTHONPATH PYTHONHOME SPARK_HOME SPARK_CONF_DIR PYSPARK_PYTHON PYSPARK_DRIVER_PYTHON PYSPARK_SUBMIT_ARGS HADOOP_CONF_DIR

PYTEST = $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help install demo test test-fast test-spark40 test-thorough check-integrations bench-suite faults bench-files bench-data bench-score bench-training bench-pretraining bench-labels bench-ablation bench-sizes bench-gpu bench-stack bench-worlds bench-everyone bench-house bench-look bench-decisions notebooks browser lint format lock audit sbom clean check-airflow docs reference

help: ## this list
	@grep -E '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 22

install: $(VENV)/.configured ## .venv from the lock file, with this package and Delta's jars in it

$(VENV)/.installed: $(LOCK) pyproject.toml
	@test -n "$(PYTHON)" && $(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
		|| { echo "bp-spark needs Python 3.11 to 3.13: make PYTHON=/path/to/python3.12" >&2; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	test -z "$(BELOW)" || realpath $(BELOW)/lib/python*/site-packages >"$$(echo $(VENV)/lib/python*/site-packages)/below.pth"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-compile --require-hashes -r $(LOCK)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

# The jars of docker/jars.lock lie in the environment's Spark, so that no session asks Maven; a bare spark-submit reads conf/.
$(VENV)/.configured: $(VENV)/.installed docker/jars.lock conf/spark-defaults.conf
	VENV="$(VENV)" JARS=delta docker/build.sh jars "$(VENV)"
	rm -rf "$(SPARK)/conf" && mkdir "$(SPARK)/conf"
	ln -s "$(CURDIR)"/conf/log4j2.properties "$(CURDIR)"/conf/spark-env.sh "$(SPARK)/conf"
	grep -v '^spark\.jars\.packages' conf/spark-defaults.conf >"$(SPARK)/conf/spark-defaults.conf"
	@touch $@

demo: install ## the whole line on real data: features, training, metrics, scores
	$(BIN)/bp-spark demo

test: lint ## lint, types, import contract, and a test of every promise
	$(PYTEST)

FAST = not slow and not faults and not integration and not thorough
test-fast: install ## the tests of pure code and of transforms: no night, no cluster, no training
	$(PYTEST) -m '$(FAST)'

# The locks differ by Spark and Delta: .venv-spark40 has these, and sees the rest (7 GB) in .venv.
test-spark40: install ## the fast tests with a Spark session on Spark 4.0 and Delta 4.0, from their own lock, in .venv-spark40
	$(MAKE) test-fast VENV=.venv-spark40 LOCK=requirements-spark40.lock BELOW=$(VENV) FAST='$(FAST) and spark'

check-integrations: install check-airflow browser ## Airflow, Chromium, the steps of the image, the demo from the wheel, Connect
	$(PYTEST) -m integration

test-thorough: install test-spark40 ## Spark 4.0, and by all cases what CI tests by a few: each write killed, 10,000 rows of any kind
	HYPOTHESIS_PROFILE=thorough $(BIN)/python -m pytest -m thorough tests
	HYPOTHESIS_PROFILE=thorough $(BIN)/python -m pytest tests/test_fuzz.py

faults: install ## every promise of docs/promises.md tried, its mechanisms broken, 500 kills, three years of nights: JSON lines to standard output
	$(BIN)/python -m bench.faults

notebooks: install ## the four notebooks on the demo's data, with what they show, to demo/notebooks
	@mkdir -p demo/notebooks
	$(BIN)/jupyter-execute --output "../demo/notebooks/{notebook_name}.ipynb" notebooks/*.ipynb

browser: # Debian's Chromium, for the test that opens a report; only where CI=true, nobody else's machine is changed
	@if [ "$$CI" = true ] && [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null \
		&& ! command -v chromium >/dev/null && ! command -v chromium-browser >/dev/null && ! command -v google-chrome >/dev/null; then \
		{ apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install --no-install-recommends chromium; } >/dev/null \
			|| echo "make browser: Chromium can't be installed; the tests that need it are skipped" >&2; \
	fi

bench-suite: install check-airflow browser ## the suite's own time, size and coverage: JSON to standard output
	$(BIN)/python -m bench.suite

bench-files: install ## files as shops have them, right, wrong without a word, rows lost: JSON lines to standard output
	$(BIN)/python -m bench.files

bench-data: install ## the data half against DuckDB, growth, a new day, dirt: JSON to standard output
	$(BIN)/python -m bench.data

bench-score: install ## the nightly pass against plain torch and other ways, growth, nights with few changes: JSON to standard output
	$(BIN)/python -m bench.score

bench-training: install ## DDP by one and by two processes, and the feed against what one learns: JSON to standard output
	$(BIN)/python -m bench.training

bench-pretraining: demo ## the transformer with and without pre-training, by share of labels used: JSON to standard output
	$(BIN)/python -m bench.pretraining --config conf/demo.yaml pretraining.max_epochs=60

bench-labels: demo ## asking the users of most use for labels against random ones, by number of labels: JSON to standard output
	$(BIN)/python -m bench.labelling --config conf/demo.yaml

bench-ablation: demo ## what each part of the prediction adds, with paired intervals: JSON to standard output
	$(BIN)/python -m bench.ablation --config conf/demo.yaml --test-date 2017-10-03

bench-sizes: install ## weights and milliseconds of the network in each size, on one thread: JSON to standard output
	$(BIN)/python -m bench.sizes

bench-gpu: install ## training and scoring by a GPU beside its machine's processor: JSON to standard output
	$(BIN)/python -m bench.gpu

bench-stack: install ## Connect beside classic, the wheel's demo, both feeds: 1 or 0 each, JSON to standard output
	$(BIN)/python -m bench.stack

bench-worlds: install ## how right the money is on shops of all kinds, goes on where it was stopped: JSON to standard output
	$(BIN)/python -m bench.worlds

bench-everyone: install ## whether everyone has a score, and how right first purchases are: JSON lines to standard output
	$(BIN)/python -m bench.everyone

bench-decisions: demo ## false alarms of A/A tests, users that the score saves, errors of weekly forecasts, recommendations: JSON lines to standard output
	$(BIN)/python -m bench.decisions

bench-house: install ## lines, packages, circles of imports, settings described once: JSON to standard output
	$(BIN)/python -m bench.house

bench-look: install ## seconds of commands that only look: JSON lines to standard output
	$(BIN)/python -m bench.look

docs: install ## the documentation as a site, build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

reference: install ## what is written from the code: pages of docs/ and the file of default settings
	$(BIN)/python docs/reference.py
	$(BIN)/bp-spark features > docs/features.md

lint: install ## ruff, mypy, import contract, the Dockerfile and the compose file
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/hadolint docker/Dockerfile
	$(BIN)/check-jsonschema --builtin-schema vendor.compose-spec docker/compose.yaml

$(AIRFLOW_VENV)/.installed: requirements-airflow.lock
	$(PYTHON) -m venv --clear $(AIRFLOW_VENV)
	$(AIRFLOW_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-compile --no-deps --require-hashes -r requirements-airflow.lock
	@touch $@

check-airflow: $(AIRFLOW_VENV)/.installed ## the example DAGs of conf/airflow in a real Airflow, in an environment of its own
	$(AIRFLOW_VENV)/bin/python tests/airflow_dags.py

format: install ## apply ruff's format and fixes
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(AUDIT_VENV)/.installed: requirements-audit.lock
	$(PYTHON) -m venv --clear $(AUDIT_VENV)
	$(AUDIT_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r requirements-audit.lock
	@touch $@

audit: $(AUDIT_VENV)/.installed ## known vulnerabilities of the lock file that docs/security.md doesn't answer (asks osv.dev)
	@$(AUDIT_VENV)/bin/pip-audit --strict --require-hashes --disable-pip --vulnerability-service osv --desc off \
		--requirement requirements.lock $$(sed -nE 's/^\| (CVE-[0-9-]+) .*/--ignore-vuln \1/p' docs/security.md) \
		|| { echo "make audit: unanswered findings stand above, or else the database could not be asked" >&2; exit 1; }

sbom: $(AUDIT_VENV)/.installed ## sbom.json: what the lock file installs, in CycloneDX
	$(AUDIT_VENV)/bin/python -W ignore -m cyclonedx_py requirements --short-PURLs --output-reproducible \
		--pyproject pyproject.toml --output-file sbom.json requirements.lock

COMPILE = uv pip compile --quiet --generate-hashes --no-emit-index-url --custom-compile-command "make lock"

lock: ## resolve the lock files anew (needs uv)
	$(COMPILE) --universal --python-version 3.11 --all-extras pyproject.toml --output-file requirements.lock
	cp requirements.lock requirements-spark40.lock
	$(COMPILE) --universal --python-version 3.11 --all-extras --group pyproject.toml:spark40 pyproject.toml \
		--output-file requirements-spark40.lock
	$(COMPILE) --python-version 3.11 --group audit --output-file requirements-audit.lock
	$(COMPILE) --python-version 3.11 --group airflow --output-file requirements-airflow.lock

clean: ## remove what the demo wrote
	rm -rf demo notebooks/demo
