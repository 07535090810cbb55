# The commands of this project. `make demo` and `make test` need Linux, Python >= 3.11 and nothing else.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Installed again only when the pins, the package's own requirements, or the place of the checkout change.
KEY := $(shell { cat pyproject.toml constraints.txt; echo '$(CURDIR)'; } | sha256sum | cut -c1-16)
STAMP := $(VENV)/.installed-$(KEY)
COMPILED := $(VENV)/.compiled-$(KEY)
# Test processes: on two cores the third fills the time in which the others wait for servers and timers; a fourth costs more.
PYTEST_WORKERS ?= 3
# Rows of the chaos suite that run at a time: most of them wait most of the time.
CHAOS_ROWS ?= 4

LINT := $(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy && $(BIN)/lint-imports
UV := build/lock/bin/uv
LOCK := $(UV) pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-annotate \
  --constraint constraints.txt --custom-compile-command 'make lock'

# Python keeps what it compiled, whatever the machine says: a farm is a dozen processes, and the tests start many farms.
# Only what is imported is compiled: most of what PyTorch and its kind bring along never is.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help install demo test chaos lint audit lock format up down clean

help:  ## this list
	@sed -n 's/^\([a-z.]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 16

install: $(STAMP)  ## the virtual environment with everything pinned

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo 'The farm needs Python 3.11 or newer: make PYTHON=/path/to/python3.11 ...' >&2; exit 1; }
	@$(BIN)/python -c '' 2>/dev/null || $(PYTHON) -m venv --clear $(VENV) || \
	  { echo 'Python cannot make a virtual environment here; on Debian: apt-get install python3-venv' >&2; exit 1; }
	@echo 'Installing into $(VENV) (once; a few minutes, most of it PyTorch)'
	$(BIN)/python -m pip install --disable-pip-version-check --no-compile -c constraints.txt -e '.[worker,embedded,test]'
	@rm -f $(VENV)/.installed-* $(VENV)/.compiled-* && touch $@

demo: $(STAMP)  ## render four pictures through the whole farm
	@$(BIN)/farm demo

# The linters run beside the tests, in the time in which those wait, and say at the end what they found. Before the first
# tests one process imports all there is to import: several would each compile the same thousands of modules.
test: $(STAMP)  ## everything: linters, types, import contracts, all tests on real servers
	@mkdir -p build; { $(LINT); } > build/lint.log 2>&1 & lint=$$!; \
	test -e $(COMPILED) || { echo 'Compiling what the tests import (once)'; \
	  $(BIN)/python -m pytest --collect-only --quiet > build/collected.log && touch $(COMPILED); }; \
	$(BIN)/python -m pytest -n $(PYTEST_WORKERS) --dist loadgroup; tests=$$?; \
	wait $$lint; linters=$$?; cat build/lint.log; \
	test $$tests -eq 0 && test $$linters -eq 0 || { echo "tests: exit code $$tests; linters: $$linters" >&2; exit 1; }

chaos: $(STAMP)  ## the chaos suite at its CI size: kill, freeze, empty, fill and lie (8 minutes on two free cores)
	$(BIN)/python -m benchmarks.chaos --size ci --parallel $(CHAOS_ROWS)

lint: $(STAMP)  ## linters, formatting, types, import contracts
	$(LINT)

audit:  ## known faults of what constraints.txt and requirements/ pin (needs the network; in an environment of its own)
	@test -x build/audit/bin/pip-audit || { $(PYTHON) -m venv build/audit && build/audit/bin/pip install --quiet pip-audit; }
	build/audit/bin/pip-audit --strict --requirement constraints.txt --no-deps --disable-pip
	build/audit/bin/pip-audit --strict --requirement requirements/worker.txt --requirement requirements/api.txt --disable-pip

lock:  ## requirements/: what the images install, with hashes; after a pin moved (needs the network)
	@test -x $(UV) || { $(PYTHON) -m venv build/lock && build/lock/bin/pip install --quiet uv; }
	printf 'flower\nhatchling\n' | $(LOCK) pyproject.toml - --output-file requirements/api.txt
	printf 'flower\nhatchling\n' | $(LOCK) pyproject.toml - --extra worker --output-file requirements/worker.txt

format: $(STAMP)  ## let ruff repair what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

up: $(STAMP)  ## the farm on this machine, until Ctrl-C
	@$(BIN)/farm up

down: $(STAMP)  ## stop what `make up` left running
	@$(BIN)/farm down

.env:  ## fresh secrets for docker compose; never overwrites
	@umask 077; while IFS= read -r line; do case "$$line" in \
	  *_PASSWORD=|*_SECRET_ACCESS_KEY=) echo "$$line$$(od -An -N24 -tx1 /dev/urandom | tr -d ' \n')";; \
	  *_ACCESS_KEY_ID=) echo "$$line$$(od -An -N10 -tx1 /dev/urandom | tr -d ' \n')";; \
	  *) echo "$$line";; esac; done < .env.example > .env
	@echo 'Wrote .env (readable by you only)'

clean:  ## remove what builds and tests leave; data directories (.farm) stay
	rm -rf $(VENV) build dist *.egg-info demo-out
	rm -rf .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
