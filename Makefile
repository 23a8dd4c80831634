# make reproduce   set up, run every notebook in order, write results/laptop/
# make test        set up, run all tests, every notebook at smoke size among them
# make test-vllm   set up .venv-vllm with vLLM for processors, run the tests that need it
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
VLLM_VENV ?= .venv-vllm
VLLM_BIN := $(VLLM_VENV)/bin

.PHONY: reproduce test test-vllm notebooks lint clean

reproduce: $(VENV)/.ready
	$(BIN)/vrag reproduce

test: $(VENV)/.ready
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-vllm: $(VLLM_VENV)/.ready
	OMP_NUM_THREADS=1 $(VLLM_BIN)/python -m pytest -m vllm tests/test_policy_vllm.py

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

# vLLM in an environment of its own: it pins lark and setuptools to other versions than the lock. Its processor build
# wants torch's CPU build, which the index has to serve. Of its dependencies torchaudio and torchcodec are linked against
# CUDA: where transformers finds them, it stops at their missing libraries.
$(VLLM_VENV)/.ready: pyproject.toml constraints.txt
	test -x $(VLLM_BIN)/python || $(PYTHON) -m venv $(VLLM_VENV)
	grep -vE '^(lark|setuptools)==' constraints.txt > $(VLLM_VENV)/constraints.txt
	$(VLLM_BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(VLLM_BIN)/python -m pip install --quiet --disable-pip-version-check \
		--constraint $(VLLM_VENV)/constraints.txt --editable '.[dev,cpu-engine]'
	$(VLLM_BIN)/python -m pip uninstall --quiet --yes torchaudio torchcodec
	touch $@

clean:
	rm -rf $(VENV) $(VLLM_VENV) .pytest_cache .ruff_cache .hypothesis
