# Every target makes its own virtual environment when it is missing, and otherwise starts at once.
PYTHON ?= python3
VENV   ?= .venv
V5     ?= .venv-transformers5
CLIENTS ?= .venv-clients
BIN    := $(VENV)/bin

export CLIPMB_TEST_BACKENDS       ?= pt,tf,flax,onnx
export CLIPMB_REQUIRE_REFERENCE   ?= 1
export CLIPMB_REQUIRE_KERNEL      ?= 1
export CLIPMB_TRANSFORMERS5_PYTHON ?= $(CURDIR)/$(V5)/bin/python
export TF_CPP_MIN_LOG_LEVEL       ?= 3

.PHONY: demo test test-without-compiler clients fuzz lint format bench docs clean

demo: $(VENV)/.installed
	$(BIN)/python -m clipmb demo --out build/demo.png

# The full suite in two processes, file by file; a part of it, named by ARGS, in one.
test: $(VENV)/.installed $(V5)/.installed
	$(BIN)/python -m pytest $(or $(ARGS),-n 2 --dist loadfile --durations=25)

# The image processor in an installation without the compiled kernel.
test-without-compiler: $(VENV)/.installed
	rm -rf build/without-compiler build/lib* build/bdist*
	CC=false $(BIN)/python -m pip install --quiet --no-deps --target build/without-compiler .
	test ! -e build/without-compiler/clipmb/common/image/_resize*
	CLIPMB_REQUIRE_KERNEL=0 PYTHONPATH=build/without-compiler $(BIN)/python -m pytest -q tests/unit/common/image \
		tests/reference/test_image_processor.py

# accelerate, peft, transformers 5 and others with our models, in an environment of their own; Keras' and Flax's programs.
clients: $(CLIENTS)/.installed $(VENV)/.installed
	CLIPMB_TEST_BACKENDS=pt $(CLIENTS)/bin/python -m pytest -q $(or $(ARGS),tests/clients/torch)
	$(if $(ARGS),,$(BIN)/python -m pytest -q -n 2 --dist loadfile tests/clients/keras tests/clients/flax)

fuzz: $(VENV)/.installed
	$(BIN)/python tests/fuzz/fuzz_resize.py
	$(BIN)/python tests/fuzz/fuzz_json.py
	$(BIN)/python tests/fuzz/fuzz_readers.py $(ARGS)

lint: $(VENV)/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/.installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/.installed
	$(BIN)/python benchmarks/run.py $(ARGS)

docs: $(VENV)/.installed
	$(BIN)/python -m mkdocs build --strict --quiet
	@echo "docs: build/site/index.html"

$(VENV)/.installed: constraints.txt setup.py src/clipmb/common/image/_resize.c
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "pip>=25.1"
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[all,dev]" --group reference
	@touch $@

# transformers 5 cannot share an environment with the reference, transformers 4.57.6.
$(V5)/.installed: constraints-transformers5.txt
	$(PYTHON) -m venv $(V5)
	$(V5)/bin/python -m pip install --quiet -r constraints-transformers5.txt
	@touch $@

$(CLIENTS)/.installed: constraints-clients.txt setup.py src/clipmb/common/image/_resize.c
	$(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/python -m pip install --quiet "pip>=25.1"
	$(CLIENTS)/bin/python -m pip install --quiet -r constraints-clients.txt
	$(CLIENTS)/bin/python -m pip install --quiet -e .
	@touch $@

clean:
	rm -rf $(VENV) $(V5) $(CLIENTS) build dist src/*.egg-info src/clipmb/common/image/_resize*.so .pytest_cache .ruff_cache .hypothesis
