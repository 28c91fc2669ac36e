# make quickstart: a real pool, a real campaign. make test: everything that CI checks.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: help quickstart pools papers docs reference test test-fast test-slow test-endurance lint format clean mergekit-env mergekit-parity vllm-env test-vllm azurite-env

help:
	@echo "make quickstart  build a real pool of models and search for its best merge (12 to 17 minutes on 2 cores, installing included; EXAMPLES=400 for a quick look)"
	@echo "make pools       the quick start's other pools: tagging, images, language, seq2seq (POOLS=tagging for one, EXAMPLES=48 for a quick look)"
	@echo "make papers      the experiments of the papers behind the methods (hours on 2 cores; goes on where it was stopped)"
	@echo "make test        lint, types, import floors, and all tests (20 to 40 minutes on 2 cores)"
	@echo "make test-fast   the fast tests only"
	@echo "make test-slow   the slow ones only: campaigns, Ray, what waits"
	@echo "make test-endurance  killed nodes and drivers, a faulty S3: minutes each, not part of make test"
	@echo "make docs        the documentation site, in site/"
	@echo "make reference   the pages of docs/ that are written from the program: settings, methods, columns, commands, API"
	@echo "make mergekit-env     mergekit 0.1.5 in an environment of its own, .mergekit/, for the test that compares"
	@echo "make mergekit-parity  the table of docs/mergekit.md anew, from merges by both (about 6 minutes)"
	@echo "make vllm-env        vLLM for the CPU, with mergequest, in an environment of its own, .vllm/ (several minutes)"
	@echo "make test-vllm       the tests with a real inference engine, in that environment (about 5 minutes on 2 cores)"
	@echo "make azurite-env     Azurite, Azure's emulator, in .azurite/ (needs npm), for tests of az:// that else are skipped"
	@echo "make format      format and fix what can be fixed"
	@echo "make clean       remove the environment, caches and runs"

quickstart: $(VENV)/installed
	$(BIN)/mergequest quickstart $(if $(CANDIDATES),--candidates $(CANDIDATES)) $(if $(EXAMPLES),--examples $(EXAMPLES))

POOLS ?= tagging images language seq2seq
pools: $(VENV)/installed
	set -e; for pool in $(POOLS); do $(BIN)/mergequest quickstart --pool $$pool $(if $(CANDIDATES),--candidates $(CANDIDATES)) $(if $(EXAMPLES),--examples $(EXAMPLES)); done

papers: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.papers

test: lint test-fast test-slow

test-slow: $(VENV)/installed-dev  # two at a time however many cores: they wait more than they compute, each file with a Ray; the longest, flows, first
	OMP_NUM_THREADS=1 $(BIN)/pytest -m "slow and not endurance" -n 2 --dist loadfile --no-loadscope-reorder

test-endurance: $(VENV)/installed-dev
	$(BIN)/pytest -m endurance

test-fast: $(VENV)/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto

docs: $(VENV)/installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

reference: $(VENV)/installed
	$(BIN)/python -m flows.cli.reference docs

mergekit-env:
	test -x .mergekit/bin/python || $(PYTHON) -m venv .mergekit
	.mergekit/bin/pip install --quiet --disable-pip-version-check "mergekit==0.1.5" "torch>=2.6,<2.14"

mergekit-parity: $(VENV)/installed-dev
	test -x .mergekit/bin/python || $(MAKE) mergekit-env
	OMP_NUM_THREADS=1 PYTHONPATH=. $(BIN)/python tests/flows/mergekit_parity.py

vllm-env:
	test -x .vllm/bin/python || $(PYTHON) -m venv .vllm
	.vllm/bin/python infra/vllm/install.py

test-vllm:  # an engine a process, and not two at a time: each is a gigabyte and more
	test -x .vllm/bin/vllm || $(MAKE) vllm-env
	OMP_NUM_THREADS=1 .vllm/bin/python -m pytest -p no:cacheprovider -m "" tests/merging/evaluation/engines tests/flows/campaign/test_engine.py

azurite-env:
	npm install --prefix .azurite --no-audit --no-fund --loglevel error azurite@3.37.0

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache *.egg-info runs cache site

$(VENV)/installed: pyproject.toml
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" || { echo "Python 3.11 or later is needed: make PYTHON=python3.12"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -e .
	touch $@

$(VENV)/installed-docs: $(VENV)/installed
	$(BIN)/pip install --quiet --disable-pip-version-check -e ".[docs]"
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(BIN)/pip install --quiet --disable-pip-version-check -e ".[dev]"
	touch $@
