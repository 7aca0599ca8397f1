# Needs python3 (3.11.5 to 3.14) and make; everything else is installed into .venv. Variables: PROFILE, EPSILONS, CORES.
PROFILE ?= demo
EPSILONS ?= 1,10
CORES ?= $(shell python3 -c "import os; print(os.cpu_count())")
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)

export PROFILE EPSILONS  # for the shell, which quotes them

.PHONY: study book publish test test-live time clean

study: .venv/installed
	snakemake --cores $(CORES) --config "profile=$$PROFILE" "epsilons=$$EPSILONS"

book: .venv/installed
	jupyter-book build book

# For maintainers: the study that was run becomes the published one. make publish PROFILE=laptop
publish: .venv/installed
	python -m workflow.publish "$$PROFILE"
	python book/build.py

test: .venv/installed-dev
	ruff check
	ruff format --check
	mypy
	lint-imports --no-cache
	OMP_NUM_THREADS=1 pytest --numprocesses $(CORES) --dist loadfile --no-loadscope-reorder

# Set-up and the commands of the README, timed in a fresh clone. make time PARTS="study test"
time: .venv/installed
	python -m benchmarks.first_contact $(PARTS)

clean: .venv/installed
	python -m workflow.clean

INSTALL := $(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable

.venv/installed: pyproject.toml constraints.txt
	python3 -c "import sys; sys.exit(not (3, 11, 5) <= sys.version_info < (3, 15) and 'python3 is %s; the study needs 3.11.5 to 3.14' % sys.version.split()[0])"
	python3 -m venv .venv
	$(INSTALL) ".[book]"
	$(BIN)/python book/_ext/vendored.py || echo "The book's viewers are not here yet: with a network, run python book/_ext/vendored.py"
	$(BIN)/python -m compileall -qq -j 0 .venv/lib || true  # on all cores; what is for another Python doesn't compile
	touch $@

.venv/installed-dev: .venv/installed
	$(INSTALL) ".[dev]"
	touch $@

.venv-live/installed: pyproject.toml tests/live/constraints.txt
	python3 -m venv .venv-live
	.venv-live/bin/python -m pip install --quiet --no-compile --constraint tests/live/constraints.txt --editable ".[live]" jupyterlab playwright pytest
	touch $@

test-live: .venv/installed .venv-live/installed
	OMP_NUM_THREADS=1 .venv-live/bin/python -m pytest tests/live/test_live.py
