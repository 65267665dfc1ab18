# make demo: from nothing to a trained model's samples.   make test: ruff and pytest.   make test-all: slow tests too.
# make soak: kills, an hour.   make gpu: what a GPU computes, and how fast; a report.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-all soak gpu
demo: .venv/installed
	$(BIN)/python data/pydocs_char/prepare.py
	$(BIN)/python train.py config/demo.py
	$(BIN)/python plot.py out-demo/log.jsonl
	$(BIN)/python sample.py --out_dir=out-demo --start="The for statement" --num_samples=3 --max_new_tokens=300

test: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/python -m pytest

test-all: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/python -m pytest -m "slow or not slow"

soak: .venv/installed-dev
	$(BIN)/python tests/by_hand/soak.py

gpu: .venv/installed-dev
	$(BIN)/python tests/by_hand/test_gpu.py

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q --upgrade 'pip>=25.1'  # the first that knows --group
	$(BIN)/pip install -q .
	touch $@

.venv/installed-dev: .venv/installed
	$(BIN)/pip install -q --group dev
	touch $@
