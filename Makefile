# `make demo` and `make test` do their own set-up. PYTHON picks the interpreter, TRANSFORMERS another version of it.
PYTHON ?= python3
TRANSFORMERS ?=
VENV ?= .venv$(TRANSFORMERS:%=-transformers-%)

.PHONY: demo test lint format clean

demo: $(VENV)/installed
	$(VENV)/bin/hf-quest demo

test: lint
	$(VENV)/bin/pytest -n 2

lint: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

format: $(VENV)/installed
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --constraint constraints.txt --editable '.[dev]'
ifneq ($(TRANSFORMERS),)
	$(VENV)/bin/pip install --quiet transformers==$(TRANSFORMERS)
endif
	touch $@

clean:
	rm -rf .venv .venv-*
