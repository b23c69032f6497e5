PYTHON ?= python3
PY := .venv/bin/python
SEEDS ?= 0
A ?= mae
B ?= finetune
BESIDE := tests/test_runs.py tests/test_mae.py tests/test_simmim.py

.PHONY: setup demo test lint lines diff clean

setup: .venv/ready

# Rebuilt only when a requirements file is newer than the last complete installation.
.venv/ready: requirements.txt requirements-dev.txt
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --upgrade -r requirements-dev.txt
	touch $@

demo: setup
	$(PY) -m tools.demo --seeds "$(SEEDS)"

# In two processes, one for each of two cores; what the second one says comes last.
test: setup
	@export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE; log=$$(mktemp); \
	$(PY) -m pytest -q -p no:cacheprovider $(BESIDE) >$$log 2>&1 & beside=$$!; \
	$(PY) -m pytest -q $(BESIDE:%=--ignore=%); here=$$?; \
	wait $$beside; there=$$?; cat $$log; rm $$log; exit $$((here + there))

lint: setup
	$(PY) -m ruff check .

lines:
	@wc -l *.py common/*.py tools/*.py

diff:
	@diff --side-by-side --suppress-common-lines --width 200 $(A).py $(B).py || true

clean:
	rm -rf runs .pytest_cache .ruff_cache __pycache__ tests/__pycache__
