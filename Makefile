# make demo   install into .venv and try everything on a synthetic cohort
# make test   linters, types and the fast tests; make test-all also the slow ones

VENV := .venv
BIN := $(VENV)/bin
# the first Python that runs and is new enough; override with `make PYTHON=...`
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)

.PHONY: help demo test test-all lint docs clean

help:
	@sed -n '1,2s/^# //p' Makefile

$(VENV)/.ready: pyproject.toml constraints.txt tools/make_venv.py
	@test -n "$(PYTHON)" || { echo "no Python >= 3.11 found; install one, or name it: make PYTHON=/path/to/python3"; exit 1; }
	@echo "installing into $(VENV) (once; a few minutes, depending on the network)"
	$(PYTHON) tools/make_venv.py $(VENV)
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(VENV)/.ready
	rm -rf demo
	$(BIN)/cfstore synth demo/h5 --slides 500 --patches 128 --dim 16 --seed 1
	$(BIN)/cfstore ingest demo/h5 --encoder synthetic --store demo/store
	$(BIN)/cfstore sql --store demo/store "SELECT event, count(*) AS patients, round(avg(time_months), 1) AS mean_months \
	  FROM patients GROUP BY event ORDER BY event"
	$(BIN)/cftrain run --cohort DEMO --preset demo --store demo/store --out demo/run --jobs 4
	$(BIN)/cftrain heatmap demo/run --top 1

lint: $(VENV)/.ready
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

# one thread per worker: torch would otherwise start a full set of threads in each
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto -m "not slow and not ray"

test-all: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadgroup

docs: $(VENV)/.ready
	$(BIN)/python tools/write_docs.py

clean:
	rm -rf $(VENV) demo build dist .mypy_cache .ruff_cache .pytest_cache *.egg-info
