# make install   the plugin's packages, into .venv beside the code; with POSTGRES=1 those for
#                a backup in PostgreSQL, too
# make demo      the main job, end to end, on recorded traffic of a real node
# make test      all tests
# make coverage  all tests, and which lines they run (takes half as long again)
# make test-all  the tests under every Python from 3.10 on that is here; TESTS=FILE for a part
# make lint      format, lint and types
# make bench     speed and memory, as ratios
# make soak      a million power cuts, random lives, traffic with kills for MINUTES (default 10) each;
#                an onion service in a Tor network of its own, where tor is installed

PYTHON ?= python3
MINUTES ?= 10
VENV := .venv/bin

.PHONY: install demo test coverage test-all lint bench report soak clean

install: .venv/installed $(if $(POSTGRES),.venv/installed-postgres)

demo: .venv/installed
	$(VENV)/python demo.py

test: .venv/installed-dev
	$(VENV)/python -m pytest -q -n auto --dist worksteal

coverage: .venv/installed-dev
	$(VENV)/python -m pytest -q -n auto --dist worksteal --cov --cov-report=term-missing:skip-covered

# The newest patch of each release that pyenv has, else the one on PATH; venvs in .venv-all.
test-all:
	for minor in 10 11 12 13 14 15; do \
		python=$$(ls -d $$HOME/.pyenv/versions/3.$$minor.*/bin/python 2>/dev/null | sort -V | tail -1); \
		python=$${python:-$$(command -v python3.$$minor)} || continue; \
		venv=.venv-all/3.$$minor; echo "== $$python"; \
		$$python -m venv $$venv \
			&& $$venv/bin/python -m pip install --quiet -r requirements-dev.txt \
			&& $$venv/bin/python -m pytest -q -n auto --dist worksteal $(TESTS) || exit 1; \
	done

lint: .venv/installed-dev
	$(VENV)/ruff format --check .
	$(VENV)/ruff check .
	$(VENV)/mypy *.py backup-cli cln_backup commands filelog monitoring postgres remote salvage serving several standby upkeep wallet tests bench

bench: .venv/installed-dev
	$(VENV)/python -m bench

report: .venv/installed-dev
	$(VENV)/python -m pip install --quiet -r requirements-report.txt
	$(VENV)/python -m bench --report docs/speed.svg

soak: .venv/installed-dev
	SOAK_MINUTES=$(MINUTES) $(VENV)/python -m pytest -q -m soak

.venv/installed: requirements.txt
	$(PYTHON) -m venv --clear .venv
	$(VENV)/python -m pip install --quiet -r requirements.txt
	touch $@

.venv/installed-postgres: .venv/installed requirements-postgres.txt
	$(VENV)/python -m pip install --quiet -r requirements-postgres.txt
	touch $@

.venv/installed-dev: .venv/installed requirements-dev.txt requirements-postgres.txt
	$(VENV)/python -m pip install --quiet -r requirements-dev.txt
	touch $@

clean:
	rm -rf .venv .venv-all .mypy_cache .ruff_cache .pytest_cache .coverage
