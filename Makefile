# Everything runs in .venv, which the first target that needs it creates.
PYTHON ?= python3.11
BIN := .venv/bin
LOWEST := .venv-lowest/bin
PIP := pip install --quiet --disable-pip-version-check

# The processes of all workers share compiled modules, also where the shell forbids to write them.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo check fast test tests test-lowest lint docs clean

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/$(PIP) --constraint constraints.txt --editable '.[recipes,demo,dev]'
	touch $@

# The oldest versions that pyproject.toml allows. Old releases of torch come with CUDA where the index has no others: 3 GB.
.venv-lowest/installed: pyproject.toml constraints-lowest.txt
	$(PYTHON) -m venv .venv-lowest
	$(LOWEST)/$(PIP) --constraint constraints-lowest.txt --editable '.[recipes,demo,test]'
	touch $@

# MiniLM on demo data: fine-tune, convert to GQA, prune by entropy and gradient and at random, recover each.
demo: .venv/installed
	$(BIN)/python recipes/demo.py --output_dir outputs/demo

# What to run before each commit: under two minutes on two cores.
check: .venv/installed
	$(MAKE) --no-print-directory --jobs 2 fast lint

fast: .venv/installed
	$(BIN)/python -m pytest --numprocesses auto --dist worksteal -m 'not slow'

# Everything: lint, types and docs while the tests run.
test: .venv/installed
	$(MAKE) --no-print-directory --jobs 2 tests lint docs

# In the order of their files: a file's tests and what they share stay together in one process.
tests: .venv/installed
	$(BIN)/python -m pytest --numprocesses auto --dist worksteal

# The fast tests, which call every public function.
test-lowest: .venv-lowest/installed
	$(LOWEST)/python -m pytest --numprocesses auto -m 'not slow'

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: .venv/installed
	$(BIN)/mkdocs build --strict --quiet --site-dir .venv/site

clean:
	rm -rf .venv .venv-lowest outputs
