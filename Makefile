# make train | study | test | soak | fuzz | bench | lint | setup. All the set-up happens by itself; PYTHON=python3.12 picks
# another.
PYTHON ?= python3
# With PYTHONDONTWRITEBYTECODE=1 all is compiled beforehand: each command would compile what it imports, for 25 s of CPU.
COMPILE := $(if $(PYTHONDONTWRITEBYTECODE),--compile-bytecode)
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=
STUDY ?= outputs/study

.DEFAULT_GOAL := help
.PHONY: help setup train study test soak fuzz bench lint format

help:
	@echo "make train   train on the built-in pictures, score, caption (ARGS='seed=1' passes settings to train.py)"
	@echo "make study   two sizes, two seeds each, trained on the built-in pictures and compared, into $(STUDY)"
	@echo "make test    the whole test suite (ARGS='-k beam' passes options to pytest)"
	@echo "make soak    faults thrown at trainings, which must end as if nothing had been (ARGS='--faults 10 --seed 7')"
	@echo "make fuzz    random tables, tars, settings and run directories for 10 minutes (ARGS='--minutes 1 --seed 7')"
	@echo "make bench   the benchmarks in short form, into docs/benchmarks.md"
	@echo "make lint    ruff, mypy, import-linter"
	@echo "make format  ruff's formatter"
	@echo "make setup   the environment in $(VENV) alone"

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version.split()[0]; \
	    sys.exit(f"Python {v} is too old: efficap needs 3.11 or newer; name one with PYTHON=" \
	    if sys.version_info < (3, 11) else 0)'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing efficap into $(VENV)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	@$(BIN)/python -m uv pip install --quiet $(COMPILE) --python $(BIN)/python --constraint constraints.txt --editable '.[dev]'
	@touch $@

train: setup
	$(BIN)/python train.py experiment=demo $(ARGS)
	$(BIN)/python eval.py run=outputs/latest
	$(BIN)/python eval.py run=outputs/latest split=irregular
	$(BIN)/python caption.py run=outputs/latest images='data/demo/images/test_000*.jpg'
	@echo
	@echo "Look at: outputs/latest/eval/test/report.html       scores, checks, curves, and captions, references and CIDEr of each picture"
	@echo "         outputs/latest/eval/irregular/report.html  the same for combinations never seen in training"
	@echo "         outputs/latest/captions/*/index.html      what caption.py writes for a folder"
	@echo "         outputs/latest/curves.png                 losses and scores over the training"

# The same command again skips what is done: trainings that ended, and evaluations newer than the weights.
study: setup
	$(BIN)/python train.py -m experiment=size_comparison hydra.sweep.dir=$(STUDY) $(ARGS)
	@for run in $(STUDY)/[0-9]*; do for split in test irregular; do \
	    test $$run/eval/$$split/sheet.png -nt $$run/model.safetensors \
	    || $(BIN)/python eval.py run=$$run split=$$split || exit; \
	done; done
	$(BIN)/python -m efficap.evaluation.compare $(STUDY)

# One process more than there are cores: many tests wait for processes of their own. In the order of conftest.py.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $$(( $$($(BIN)/python -c 'import os; print(os.cpu_count())') + 1 )) \
	    --dist loadfile --no-loadscope-reorder $(ARGS)

soak: setup
	PYTHONPATH=tests $(BIN)/python -m soak $(ARGS)

fuzz: setup
	PYTHONPATH=tests $(BIN)/python -m fuzz $(ARGS)

bench: setup
	$(BIN)/python -m uv pip install --quiet $(COMPILE) --python $(BIN)/python --constraint constraints.txt --editable '.[dev,bench]'
	$(BIN)/python bench/all.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
