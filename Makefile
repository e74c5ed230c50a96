# make install   makes .venv with the versions of requirements.txt; PYTHON=python3.12 chooses the interpreter
# make model     runs all five phases of a recipe: make model RECIPE=my.yaml; first it says what they take
# make demo      runs a whole recipe on a CPU, without the hub or a GPU: some 25 minutes of one core with bf16
# make test      runs the whole test suite, offline
# make soak      attacks every phase: kills, cut power, two starters, damaged files, texts that nobody would write;
#                and loads what is saved in older releases, which it installs under .soak/
# make check     runs ruff, mypy and import-linter
# make bench     compares speed and memory of each phase with two other ways of running it

PYTHON ?= python3
BIN := .venv/bin

.PHONY: install model demo test soak check bench lock audit

install: .venv/installed

.venv/installed: requirements.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --requirement requirements.txt --editable .
	touch $@

model: install
	$(BIN)/python -m modernbert_small.run $(RECIPE)

demo: install
	$(BIN)/python -m modernbert_small.demo

test: install
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

soak: install
	OMP_NUM_THREADS=1 $(BIN)/pytest $(filter-out tests/soak_jobs.py,$(wildcard tests/soak_*.py))

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

bench: install
	$(BIN)/python benchmarks/speed.py

# Writes requirements.lock: all packages with hashes, for Linux with x86-64. Needs uv (pip install uv) and PyPI.
lock:
	(echo '# Every package that requirements.txt brings on Linux with x86-64 and Python 3.11, with hashes. Made by `make lock`.'; \
	echo '# pip install --require-hashes --requirement requirements.lock && pip install --no-deps --editable .'; \
	uv pip compile requirements.txt --quiet --generate-hashes --no-header --no-annotate \
	--no-emit-index-url --python-version 3.11 --python-platform x86_64-manylinux_2_28) > requirements.lock.tmp
	mv requirements.lock.tmp requirements.lock

# Looks the locked packages up in the database of known vulnerabilities. Needs pip-audit (pip install pip-audit).
audit:
	pip-audit --no-deps --disable-pip --requirement requirements.lock
