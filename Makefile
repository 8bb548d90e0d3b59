PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Threads that wait asleep: spinning ones crawl where another program uses a core.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: quickstart test matrix lint install clean

quickstart: install ## train a small model and its flat twin, generate, write runs/quickstart/report.html
	$(BIN)/tdlm quickstart --output runs/quickstart

test: lint ## everything that CI runs
	$(BIN)/python -m pytest -m "not slow and not gpu"

matrix: install ## oldest and newest transformers: train, save, load, load as remote code, generate
	$(BIN)/python tests/matrix.py

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p tdlm

install: $(VENV)/.installed

# Directories: a new file must be installed again (strict editable mode), an edited one is live.
$(VENV)/.installed: pyproject.toml constraints.txt hub_card modeling_tdlm tokenization trainer
	$(PYTHON) -c "import sys; sys.exit('tdlm needs Python 3.11 or newer, not ' + sys.version) if sys.version_info < (3, 11) else 0"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build runs *.egg-info
