# `make demo` and `make test` do their own set-up. PYTHON picks the interpreter, TRANSFORMERS another version of it.
PYTHON ?= python3
TRANSFORMERS ?=
VENV ?= .venv$(TRANSFORMERS:%=-transformers-%)
SOURCES = $(wildcard csrc/* tests/*.cpp)

.PHONY: demo app test long kernels docs dist notebooks pictures lint format clean

demo: $(VENV)/demo
	$(VENV)/bin/hf-quest demo

app: $(VENV)/app
	$(VENV)/bin/hf-quest app

# A thread for each of the two workers, or they wait for each other. A file is run by one of them, so that what its tests
# share is made once. With another Transformers, what does not depend on its version is left out.
PYTEST = OMP_NUM_THREADS=1 $(VENV)/bin/pytest -n 2
BY_FILE = --dist loadfile --no-loadscope-reorder -m "$(if $(TRANSFORMERS),not any_transformers and) not csrc and

test: lint
	$(PYTEST) $(BY_FILE) not long"

# The app in a browser, evaluations with pretrained weights, compiled prompts of all families, sequences made at random.
long: $(VENV)/installed
	$(PYTEST) $(BY_FILE) long"

# What a change to csrc may break and no GPU is needed for: kernels that nvcc compiles for every GPU, or a CPU runs.
kernels: $(VENV)/installed
	$(PYTEST) -m csrc

# The site, in build/docs. Any warning fails it, as does a public name that no page documents.
docs: $(VENV)/docs
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict

# A wheel and an sdist, in dist. tests/try_wheel.py tries the wheel in a fresh environment.
dist: $(VENV)/dist
	rm -rf dist
	$(VENV)/bin/python -m build

notebooks: $(VENV)/installed $(VENV)/notebooks
	$(VENV)/bin/python notebooks/execute.py

# With Chromium on the PATH: twelve pictures of the app, of which two are in the docs.
pictures: $(VENV)/installed
	HF_QUEST_PICTURES=build/pictures $(VENV)/bin/pytest -n 0 tests/test_browser.py -k "default or beyond"
	cp build/pictures/finished-wide-light.png docs/app.png
	cp build/pictures/finished-wide-dark.png docs/app-dark.png

lint: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/clang-format --dry-run --Werror $(SOURCES)

format: $(VENV)/installed
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $(SOURCES)

$(VENV)/demo: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/app $(VENV)/dist $(VENV)/docs $(VENV)/notebooks: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --constraint constraints.txt --editable '.[$(@F)]'
	touch $@

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --constraint constraints.txt --editable '.[dev]'
ifneq ($(TRANSFORMERS),)
	$(VENV)/bin/pip install --quiet transformers==$(TRANSFORMERS)
endif
	touch $@

clean:
	rm -rf .venv .venv-* build dist
