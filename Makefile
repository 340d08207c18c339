# Two commands make everything: `make quickstart` and `make test`. All install first, if need be.
PYTHON ?= python3.11
BIN := .venv/bin

.PHONY: install quickstart test test-fast test-slow check clean

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

quickstart: install  ## the main job: 2 tasks x 2 seeds, the results table
	$(BIN)/aepo quickstart

test: install check  ## all tests but the slow ones; names the 20 that take longest
	$(BIN)/python -m pytest -n auto --dist loadgroup --durations=20 -m "not slow"

test-slow: install  ## the tests marked `slow`: every documented command, hundreds of odd inputs, long training
	$(BIN)/python -m pytest -n auto --dist loadgroup -m slow

test-fast: install  ## tests that need neither Ray nor training
	$(BIN)/python -m pytest -n auto --dist loadgroup -m "not slow and not ray and not trains"

check: install  ## style, types, who may import whom
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:  ## the environment and caches, not results
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
