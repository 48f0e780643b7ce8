# Two commands on a fresh machine: `make demo` and `make test`. Both install what is missing into .venv.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
# Some CPUs announce AMX without running it; an upper bound that is harmless elsewhere.
export ONEDNN_MAX_CPU_ISA ?= AVX512_CORE_BF16

.PHONY: demo test lint wheel clean

demo: $(VENV)/.installed
	$(BIN)/nextflow-hf demo --output demo

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n 2 tests

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The wheel must work where no checkout is.
wheel: $(VENV)/.installed-dev
	$(BIN)/python tests/check_wheel.py

# torch comes first and pinned; an unpinned one would bring gigabytes of CUDA.
$(VENV)/.installed: setup.cfg constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info demo
