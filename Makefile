PYTHON ?= python3
PY := .venv/bin/python
SEEDS ?= 0
A ?= mae
B ?= finetune

.PHONY: setup demo test lint lines diff clean

setup: .venv/ready

# Rebuilt only when a requirements file is newer than the last complete installation.
.venv/ready: requirements.txt requirements-dev.txt
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --upgrade -r requirements-dev.txt
	touch $@

demo: setup
	$(PY) demo.py --seeds "$(SEEDS)"

test: setup
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(PY) -m pytest -q

lint: setup
	$(PY) -m ruff check .

lines:
	@wc -l *.py

diff:
	@diff --side-by-side --suppress-common-lines --width 200 $(A).py $(B).py || true

clean:
	rm -rf runs .pytest_cache .ruff_cache __pycache__ tests/__pycache__
