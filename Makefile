# Two commands on a fresh machine: `make recall` (the main experiment) and `make test`.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin

.PHONY: recall test lint bench clean

recall: $(VENV)/.installed  ## train the mixers on overwrite recall; ends with a table and accuracy.png
	$(BIN)/python -m experiments.run recall

test: $(VENV)/.installed  ## the whole suite, in parallel
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

bench: $(VENV)/.installed  ## chunk against recurrent on the CPU
	$(BIN)/python -m experiments.bench.chunk

# torch first and by its exact version: a range would pull the registry's newest build with its CUDA packages
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[triton,experiments,dev]"
	touch $@

clean:
	rm -rf $(VENV) results
