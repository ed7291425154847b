# make demo   install what is missing, then serve a real model while it learns, with a report
# make test   install what is missing, then run the tests (ARGS="tests/engine -k cancel")
# make lint   ruff, mypy, import contract
# make bench  speed of the engine on this machine, beside transformers
# PYTHON=python3.12 chooses the interpreter; VENV=path the environment.

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
ARGS ?=
BIN := $(VENV)/bin
INPUTS := pyproject.toml constraints.txt scripts/make_venv.py

.PHONY: demo test lint format bench clean

demo: $(VENV)/.ready-run
	$(BIN)/python -m invivo.demo $(ARGS)

test: $(VENV)/.ready-dev
	@$(BIN)/python -m compileall -q src  # dozens of tests start processes
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

lint: $(VENV)/.ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.ready-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.ready-dev
	$(BIN)/python bench/engine.py $(ARGS)

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis

$(VENV)/.ready-run: $(INPUTS)
	$(PYTHON) scripts/make_venv.py $(VENV) run
	@touch $@

$(VENV)/.ready-dev: $(INPUTS)
	$(PYTHON) scripts/make_venv.py $(VENV) dev
	@touch $(VENV)/.ready-run $@
