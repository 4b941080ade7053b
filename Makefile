# Everything runs in .venv, which the first target that needs it creates.
PYTHON ?= python3.11
BIN := .venv/bin

.PHONY: demo test lint docs clean

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[recipes,demo,dev]'
	touch $@

# MiniLM on demo data: fine-tune, convert to GQA, prune by entropy and gradient and at random, recover each.
demo: .venv/installed
	$(BIN)/python recipes/demo.py --output_dir outputs/demo

test: lint docs
	$(BIN)/python -m pytest --numprocesses auto

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: .venv/installed
	$(BIN)/mkdocs build --strict --quiet --site-dir .venv/site

clean:
	rm -rf .venv outputs
