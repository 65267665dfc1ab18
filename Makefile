# make demo: from nothing to a trained model's samples.   make test: ruff and pytest.   make soak: kills, 20 minutes.
# make gpu: what a GPU computes, and how fast; a report.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test soak gpu
demo: .venv/installed
	$(BIN)/python data/pydocs_char/prepare.py
	$(BIN)/python train.py config/demo.py
	$(BIN)/python plot.py out-demo/log.jsonl
	$(BIN)/python sample.py --out_dir=out-demo --start="The for statement" --num_samples=3 --max_new_tokens=300

test: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/python -m pytest

soak: .venv/installed-dev
	$(BIN)/python tests/soak.py

gpu: .venv/installed-dev
	$(BIN)/python tests/test_gpu.py

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -r requirements.txt
	touch $@

.venv/installed-dev: .venv/installed requirements-dev.txt
	$(BIN)/pip install -q -r requirements-dev.txt
	touch $@
