# make reproduce   set up, run every notebook in order, write results/laptop/
# make test        set up, run all tests, every notebook at smoke size among them
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: reproduce test notebooks lint clean

reproduce: $(VENV)/.ready
	$(BIN)/vrag reproduce

test: $(VENV)/.ready
	$(BIN)/python -m pytest -n 2 --dist loadfile

# Runs every notebook and keeps its outputs in notebooks/ (what is committed).
notebooks: $(VENV)/.ready
	$(BIN)/vrag reproduce --force --save-outputs

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "vrag_lib needs Python 3.11 or newer; pass PYTHON=...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis
