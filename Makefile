# `make demo` and `make test` need nothing but make and Python 3.11 or newer; the first of them fills .venv.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready

.PHONY: demo test lint bench clean

demo: $(READY)
	$(BIN)/python demo/demo.py

# One thread of arithmetic per test process: several processes share the cores.
test: lint
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 \
		$(BIN)/pytest --numprocesses logical --maxprocesses 8 --dist worksteal -q

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)
	$(BIN)/python benchmarks/merge.py

clean:
	rm -rf .venv demo-out .mypy_cache .ruff_cache .pytest_cache

# The pins of constraints.txt need 3.11; the package itself runs on 3.10 as well.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "make needs Python 3.11 or newer; try: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	@touch $@
