PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
VOCABULARY := .assets/tokenizer/vocab.json

.PHONY: quickstart test test-slow parity lint format bench

quickstart: $(INSTALLED)
	$(BIN)/python -m quickstart.run

test: $(INSTALLED) $(VOCABULARY)
	$(BIN)/python -m pytest -n 2

# Everything, the checks that take minutes included
test-slow: $(INSTALLED) $(VOCABULARY)
	$(BIN)/python -m pytest -m ''

# The comparisons with transformers alone, with the table of README.md at their end
parity: $(INSTALLED) $(VOCABULARY)
	$(BIN)/python -m pytest -n 2 tests/parity

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(INSTALLED)
	$(BIN)/python -m benchmarks.encoder

# torchvision serves comparisons with transformers alone, see quickstart/torchvision.py
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps --upgrade --target $(VENV)/torchvision torchvision
	touch $@

$(VOCABULARY): | $(INSTALLED)
	$(BIN)/python -m quickstart.vocabulary $(dir $@)
