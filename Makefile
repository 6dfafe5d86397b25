# make demo   set up, then the tour on generated text
# make test   set up, then the tests
# make clean  remove what these made

PYTHON ?= python3
VENV := .venv
# The book's own model, which the importer is tested against, without TensorFlow, JupyterLab and the old NumPy it asks for.
BOOK := llms-from-scratch==1.0.19
PIP := $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check
INSTALLED := $(VENV)/installed
TESTABLE := $(VENV)/testable

.PHONY: demo test clean
demo: $(INSTALLED)
	$(VENV)/bin/hfgpt demo

# Tests run in two processes of one thread each: the models are too small to share a thread's work.
test: $(TESTABLE)
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2 --dist loadfile

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "hfgpt needs Python 3.11 or newer: make PYTHON=python3.12" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) --constraint constraints.txt --editable .
	touch $@

$(TESTABLE): $(INSTALLED)
	$(PIP) --constraint constraints.txt --editable '.[test]'
	$(PIP) --no-deps $(BOOK)
	touch $@

clean:
	rm -rf $(VENV) runs
