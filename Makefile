# make install   the plugin's packages, into .venv beside the code
# make demo      the main job, end to end, on recorded traffic of a real node
# make test      all tests, with coverage
# make lint      format, lint and types
# make bench     speed and memory, as ratios
# make soak      a million power cuts, random lives, traffic with kills for MINUTES (default 10) each

PYTHON ?= python3
MINUTES ?= 10
VENV := .venv/bin

.PHONY: install demo test lint bench soak clean

install: .venv/installed

demo: .venv/installed
	$(VENV)/python demo.py

test: .venv/installed-dev
	$(VENV)/python -m pytest -q -n auto --cov --cov-report=term-missing:skip-covered

lint: .venv/installed-dev
	$(VENV)/ruff format --check .
	$(VENV)/ruff check .
	$(VENV)/mypy *.py commands filelog wallet upkeep backup-cli tests bench

bench: .venv/installed-dev
	$(VENV)/python -m bench

soak: .venv/installed-dev
	SOAK_MINUTES=$(MINUTES) $(VENV)/python -m pytest -q -m soak

.venv/installed: requirements.txt
	$(PYTHON) -m venv --clear .venv
	$(VENV)/python -m pip install --quiet -r requirements.txt
	touch $@

.venv/installed-dev: .venv/installed requirements-dev.txt
	$(VENV)/python -m pip install --quiet -r requirements-dev.txt
	touch $@

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .coverage
