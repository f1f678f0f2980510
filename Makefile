# make demo   see a lost disk come back       make test   everything that CI runs
# make check  lint and types only             make clean  remove what was made here
# make bench  measure beside the peers        make campaign  kill, damage and fuzz it for hours
# make lowest test with the lowest versions of all requirements
# make mutants  break the code in a thousand small ways, and count what no test notices

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CAMPAIGN := tests/campaigns
# tests wait for servers and processes most of the time
WORKERS = $(shell $(PYTHON) -c 'import os; print(min(2 * os.cpu_count(), 16))')
# of the order of the tests and of all random input: a failure can be repeated; another SEED tries something else
SEED = 1
PYTEST = -m pytest -n $(WORKERS) --dist worksteal --randomly-seed $(SEED) --hypothesis-seed $(SEED)
READY := $(VENV)/.ready
LOWEST := .venv-lowest

.PHONY: demo test lowest check campaign clean system bench mutants

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("selfheal needs Python 3.11 or later, this is " + sys.version.split()[0]) if sys.version_info < (3, 11) else 0'
	@echo "making $(VENV) …"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade 'pip>=25.1'
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[server,postgres,validate,cli,watch]' --group dev
	@touch $(READY)

demo: $(READY)
	@$(BIN)/python -m examples.demo

test: $(READY) system check
	@$(BIN)/python $(PYTEST) --durations 20

# Where versions differ: HTTP, stores, both databases, commands.
lowest: $(LOWEST)/.ready system
	@$(LOWEST)/bin/python $(PYTEST) tests/contract/test_http.py tests/http tests/blobs tests/db tests/sql \
		tests/scripts/test_bulk_commands.py tests/scripts/test_cli.py tests/scripts/test_name_commands.py tests/scripts/test_serve.py \
		$(wildcard tests/test_middleware*.py tests/test_store*.py)

$(LOWEST)/.ready: pyproject.toml tests/lowest.txt
	@echo "making $(LOWEST) …"
	@$(PYTHON) -m venv --clear $(LOWEST)
	@$(LOWEST)/bin/python -m pip install --quiet --disable-pip-version-check --upgrade 'pip>=25.1'
	@$(LOWEST)/bin/python -m pip install --quiet --disable-pip-version-check --constraint tests/lowest.txt \
		--editable '.[server,postgres,cli]' --group test
	@touch $(LOWEST)/.ready

# Hours of faults, kills, damage and random input; docs/reliability.md says what each promises.
campaign: $(READY) system
	@$(BIN)/python -m pytest --campaign --timeout 14400 -p no:randomly $(CAMPAIGN)

# Killed and survived per package; `.venv/bin/mutmut show NAME` shows one that survived.
mutants: $(READY)
	@$(BIN)/mutmut run --max-children 2
	@$(BIN)/mutmut results | grep survived || true
	@$(BIN)/mutmut results --all True | awk -F '[. :]+' '/^ +selfheal/ { packages[$$3]; seen[$$3, $$NF]++ } END { for (package in packages) \
		printf "%-10s %4d killed %4d survived\n", package, seen[package, "killed"] + seen[package, "timeout"], seen[package, "survived"] }' | sort

check: $(READY)
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --check --quiet .
	@$(BIN)/mypy --no-error-summary
	@found=$$($(BIN)/lint-imports 2>&1) || { echo "$$found"; exit 1; }

# Real servers for the tests: installed where that is allowed, used when present, otherwise their tests are skipped.
system:
	@sh tests/system.sh

# Peers are installed in environments of their own, below .bench; see benchmarks/README.md.
bench: $(READY)
	@sh benchmarks/system.sh
	@$(BIN)/python -m benchmarks

clean:
	@rm -rf $(VENV) $(LOWEST) .demo .bench mutants .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis dist build
