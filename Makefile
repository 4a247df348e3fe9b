# `make demo` and `make test` need nothing but make and Python 3.11 or newer; the first of them fills .venv.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready
SITE_READY := .venv/ready-site
BUILD_READY := .venv-build/ready
# One thread of arithmetic per test process: several processes share the cores.
SETTINGS := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
PROCESSES := --numprocesses logical --maxprocesses 8 --dist worksteal -q
# The quick tests: no matrix of merges, no other library's models, no signals, kills and full disks.
FAST := $(addprefix tests/,adapters checkpoint containers docs formats models output packaging planning quantization) \
	$(addprefix tests/,reporting verification) \
	$(addprefix tests/test_,abilities.py architecture.py dtypes.py layers.py request.py) \
	$(addprefix --ignore=tests/,adapters/test_lora_against_peft.py containers/test_descriptors.py docs/test_commands.py \
	checkpoint/test_card_header.py checkpoint/test_hub.py formats/test_format_matrix.py formats/test_vllm_rules.py \
	models/test_linears_of_families.py models/test_skeleton_limits.py \
	output/test_location.py output/test_record.py planning/test_expert_stacks.py planning/test_loaders.py) \
	-k 'not tiles_make_the_whole and not thousand'

.PHONY: demo test test-fast lint format coverage docs bench dist clean

demo: $(READY)
	$(BIN)/python demo/demo.py

test: lint
	$(SETTINGS) $(BIN)/pytest $(PROCESSES)

test-fast: $(READY)
	$(SETTINGS) $(BIN)/pytest $(PROCESSES) $(FAST)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Also of the processes that tests start. A test that fails here alone fails because measuring is slow and takes memory;
# `make test` judges. The report fails below the bound in pyproject.toml.
coverage: $(READY)
	$(BIN)/coverage erase
	-$(SETTINGS) $(BIN)/coverage run -m pytest $(PROCESSES) --deselect tests/test_help_speed.py
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage html --quiet --fail-under 0
	$(BIN)/coverage report

# A broken link is an error.
docs: $(SITE_READY)
	$(BIN)/sphinx-build --conf-dir docs --builder html --fail-on-warning --keep-going --quiet . site

bench: $(READY)
	$(BIN)/python benchmarks/merge.py

# Only what builds is installed for it: no torch.
dist: $(BUILD_READY)
	rm -rf dist
	.venv-build/bin/python -m build --outdir dist .

clean:
	rm -rf .venv .venv-build build dist demo-out site htmlcov .coverage .coverage.* .hypothesis .mypy_cache .ruff_cache .pytest_cache *.egg-info
	find demo benchmarks docs fixtures lora_merge tests -name __pycache__ -prune -exec rm -rf {} +

# The pins of constraints.txt need 3.11; the package itself runs on 3.10 as well.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "make needs Python 3.11 or newer; try: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	@touch $@

$(SITE_READY): $(READY)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	@touch $@

$(BUILD_READY): constraints.txt
	$(PYTHON) -m venv .venv-build
	.venv-build/bin/python -m pip install --quiet --constraint constraints.txt build
	@touch $@
