# Every target makes its own virtual environment when it is missing, and otherwise starts at once.
PYTHON ?= python3
VENV   ?= .venv
V5     ?= .venv-transformers5
CLIENTS ?= .venv-clients
EXPORTS ?= .venv-exports
RAY     ?= .venv-ray
OLDEST ?= .venv-oldest
PEERS  ?= .venv-peers
TESTING := pytest==9.2.0 pytest-xdist==3.8.0 hypothesis==6.170.15
# What other versions of Python and of the packages could change; what takes long and does not depend on them is left out.
PART   := $(addprefix tests/unit/,test_pipeline.py common/test_config.py common/test_saving.py common/data common/text common/image \
	$(addprefix common/checkpoint/test_,tf_h5.py flax_msgpack.py safetensors_dialects.py)) \
	-k "not whatever_a_writer and not threads and not quadratic and not learned_vocabulary and not flipped_bits"
# The kernel is compiled in this folder, for one environment at a time.
LOCK   := $(if $(shell command -v flock 2>/dev/null),flock Makefile)
# A Python of this version: on the PATH, or of pyenv.
find   = $(firstword $(shell python$(1) -c 'import sys; print(sys.executable)' 2>/dev/null) \
	$(wildcard $(HOME)/.pyenv/versions/$(1).*/bin/python))
BIN    := $(VENV)/bin

export CLIPMB_TEST_BACKENDS       ?= pt,tf,flax,onnx
export CLIPMB_REQUIRE_REFERENCE   ?= 1
export CLIPMB_REQUIRE_KERNEL      ?= 1
export CLIPMB_TRANSFORMERS5_PYTHON ?= $(CURDIR)/$(V5)/bin/python
export TF_CPP_MIN_LOG_LEVEL       ?= 3

.PHONY: environments demo test test-without-compiler clients javascript newest oldest fuzz lint format bench docs clean

# All of them, which `make --jobs=2` installs in less time than one after the other.
environments: $(addsuffix /.installed,$(VENV) $(V5) $(CLIENTS) $(EXPORTS) $(RAY) $(OLDEST) \
	$(foreach version,3.12 3.13,$(if $(call find,$(version)),.venv-$(version))))

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

# accelerate, peft, transformers 5 and others with our models, in an environment of their own; the Trainer of transformers 4;
# what loads exported files and asks the server, in an environment without a framework; Ray, in another; Keras' and
# Flax's programs; Optimum.
clients: $(CLIENTS)/.installed $(EXPORTS)/.installed $(RAY)/.installed $(VENV)/.installed
	CLIPMB_TEST_BACKENDS=pt $(CLIENTS)/bin/python -m pytest -q $(or $(ARGS),tests/clients/torch)
	$(if $(ARGS),,CLIPMB_TEST_BACKENDS=pt $(BIN)/python -m pytest -q tests/clients/torch/test_transformers.py -k trainer)
	$(if $(ARGS),,CLIPMB_TEST_BACKENDS=onnx $(EXPORTS)/bin/python -m pytest -q tests/clients/exports tests/clients/openai)
	$(if $(ARGS),,CLIPMB_TEST_BACKENDS=onnx $(RAY)/bin/python -m pytest -q tests/clients/ray)
	$(if $(ARGS),,$(BIN)/python -m pytest -q -n 2 --dist loadfile tests/clients/keras tests/clients/flax tests/clients/optimum)
	$(if $(ARGS),,$(BIN)/python -m pytest -q tests/clients/browser)
	$(if $(ARGS),,$(if $(shell command -v npm),$(MAKE) --no-print-directory javascript,@echo "clients: there is no npm, so transformers.js did not run"))

# transformers.js, in Node and in a browser where there is Chromium. Its packages' own scripts fetch what nothing here needs.
javascript: $(VENV)/.installed build/javascript/.installed
	$(BIN)/python -m pytest -q tests/clients/javascript

# The newest versions of everything but PyTorch and TensorFlow, on each of these Pythons that is there.
NEWEST := flax,onnx
newest: newest-3.12 newest-3.13

newest-3.12: SOME := $(addprefix tests/unit/common/,text/test_unicode.py image test_config.py)
newest-3.13: SOME := $(PART)
newest-%:
	$(if $(call find,$*),$(MAKE) --no-print-directory .venv-$*/.installed,@echo "newest: no Python $* was found, so nothing ran on it")
	$(if $(call find,$*),.venv-$*/bin/python -m clipmb doctor)
	$(if $(call find,$*),.venv-$*/bin/python -m clipmb demo --out build/demo-$*.png)
	$(if $(call find,$*),CLIPMB_TEST_BACKENDS=$(NEWEST) .venv-$*/bin/python -m pytest -q -n 2 --dist loadfile $(SOME))

# The oldest versions that pyproject.toml takes, on Python 3.11. Their own warnings are no errors.
oldest: $(OLDEST)/.installed
	$(OLDEST)/bin/python -m clipmb doctor
	$(OLDEST)/bin/python -m clipmb demo --out build/demo-oldest.png
	CLIPMB_TEST_BACKENDS=onnx $(OLDEST)/bin/python -m pytest -q -n 2 --dist loadfile -W default $(PART)

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

bench: $(PEERS)/.installed
	$(PEERS)/bin/python benchmarks/run.py $(ARGS)

docs: $(VENV)/.installed
	$(BIN)/python -m mkdocs build --strict --quiet
	@echo "docs: build/site/index.html"

$(PEERS)/.installed: GROUPS := --group peers
$(VENV)/.installed $(PEERS)/.installed: constraints.txt setup.py src/clipmb/common/image/_resize.c
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet "pip>=25.1"
	$(LOCK) $(@D)/bin/python -m pip install --quiet -c constraints.txt -e ".[all,dev]" --group reference $(GROUPS)
	@touch $@

# transformers 5 cannot share an environment with the reference, transformers 4.57.6.
$(V5)/.installed: constraints-transformers5.txt
	$(PYTHON) -m venv $(V5)
	$(V5)/bin/python -m pip install --quiet -r constraints-transformers5.txt
	@touch $@

$(CLIENTS)/.installed: constraints-clients.txt
$(EXPORTS)/.installed: constraints-exports.txt
$(RAY)/.installed: constraints-ray.txt
$(CLIENTS)/.installed $(EXPORTS)/.installed $(RAY)/.installed: setup.py src/clipmb/common/image/_resize.c
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet "pip>=25.1"
	$(@D)/bin/python -m pip install --quiet -r $(filter constraints-%,$^)
	$(LOCK) $(@D)/bin/python -m pip install --quiet -e .
	@touch $@

.venv-3.%/.installed: constraints-newest.txt setup.py src/clipmb/common/image/_resize.c
	$(call find,3.$*) -m venv .venv-3.$*
	.venv-3.$*/bin/python -m pip install --quiet "pip>=25.1"
	$(LOCK) .venv-3.$*/bin/python -m pip install --quiet -c constraints-newest.txt -e ".[flax,onnx,convert,train,fast]" $(TESTING)
	@touch $@

$(OLDEST)/.installed: constraints-oldest.txt setup.py src/clipmb/common/image/_resize.c
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet "pip>=25.1"
	$(LOCK) $(OLDEST)/bin/python -m pip install --quiet -c constraints-oldest.txt -e ".[onnx,convert,train,fast]" $(TESTING)
	@touch $@

build/javascript/.installed: tests/clients/javascript/package.json
	mkdir -p build/javascript
	cp tests/clients/javascript/package.json build/javascript
	npm install --prefix build/javascript --ignore-scripts --silent
	@touch $@

clean:
	rm -rf $(VENV) $(V5) $(CLIENTS) $(EXPORTS) $(RAY) $(OLDEST) $(PEERS) .venv-3.12 .venv-3.13 build dist src/*.egg-info src/clipmb/common/image/_resize*.so .pytest_cache .ruff_cache .hypothesis
