PYTHON ?= python3
PY := .venv/bin/python
SEEDS ?= 0
A ?= mae
B ?= finetune
METHODS ?= mae simmim um_mae
N ?= 2

.PHONY: setup demo read assignment assignments-check test mutants torture lint lines diff clean

setup: .venv/ready

# Rebuilt only when a requirements file is newer than the last complete installation.
.venv/ready: requirements.txt requirements-dev.txt
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --upgrade -r requirements-dev.txt
	touch $@

demo: setup
	$(PY) -m tools.demo --seeds "$(SEEDS)"

read: setup
	$(PY) -m tools.read --methods $(METHODS)

# In two processes, one for each of two cores, which share the files out (tests/conftest.py); what the second one prints
# comes last.
test: setup
	@export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE TEST_CLAIMS=$$(mktemp -d); log=$$(mktemp); \
	$(PY) -m pytest -q -p no:cacheprovider >$$log 2>&1 & second=$$!; \
	$(PY) -m pytest -q; code=$$?; \
	wait $$second; second_code=$$?; cat $$log; rm -r $$log $$TEST_CLAIMS; exit $$((code + second_code))

mutants: setup
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(PY) -m tools.mutants

torture: setup
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(PY) -m tools.torture

lint: setup
	$(PY) -m ruff check .

lines:
	@wc -l *.py common/*.py tools/*.py

diff:
	@diff --side-by-side --suppress-common-lines --width 200 $(A).py $(B).py || true

assignment: setup
	$(PY) -m tools.assign $(N)

assignments-check: setup
	ASSIGNMENTS=all OMP_NUM_THREADS=1 $(PY) -m pytest -q tests/tools/test_assign.py tests/tools/test_grade.py

clean:
	rm -rf runs .pytest_cache .ruff_cache
	find . -path ./.venv -prune -o -name __pycache__ -exec rm -rf {} +
