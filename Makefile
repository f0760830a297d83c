# make demo | make test | make stress | make starter: each works alone, from a fresh clone with nothing installed.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test stress starter format clean

demo: .venv/installed
	$(BIN)/python starter.py starter
	$(BIN)/python bench/demo.py

starter: .venv/installed
	$(BIN)/python starter.py starter

test: .venv/test-installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadscope

# What takes minutes or guards a rare path: part of the work on an issue, and no part of `make test`.
stress: .venv/test-installed
	$(BIN)/python -m pytest tests/stress -n auto --maxprocesses 8 --dist loadscope
	@echo "Programs with flags and tables of their own (python tests/stress/NAME.py --help):"
	@for name in crash fuzz soak modes tasks fingerprints; do echo "  $$name.py: $$(sed -n '1s/^"""//p' tests/stress/$$name.py | sed 's/"""$$//')"; done

format: .venv/test-installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The virtual environment is complete only when its stamp is there; an install that broke off starts again.
.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement requirements.txt
	touch $@

.venv/test-installed: .venv/installed requirements-dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement requirements-dev.txt
	touch $@

clean:
	rm -rf .venv result
