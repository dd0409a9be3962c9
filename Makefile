# Every target first makes .venv where it is missing or stale; nothing else has to be prepared.
SHELL := /bin/sh
PY := .venv/bin/python
export PYTHON

.PHONY: help env serve test check check-format check-lint check-types check-imports check-proto format proto

help:
	@echo "make serve    start the service on this machine; Ctrl-C stops it"
	@echo "make test     run the tests (PYTEST_ARGS='-m \"not ray\"' for a part of them)"
	@echo "make check    formatting, lint, types, import contracts, proto drift"
	@echo "make format   format the code and mend what lint can mend"
	@echo "make proto    regenerate twotower/pb from protos/"
	@echo "make env      only make the environment"

env:
	@sh scripts/bootstrap.sh

serve: env
	@echo "Starting the service; Ctrl-C stops it"
	@exec $(PY) -m cluster up

# The tests on a local Ray mostly wait, so the others run beside them, and give way to them. On Ray two groups of files
# (pytest.mark.xdist_group) share what they started, and take equally long.
test: env
ifdef PYTEST_ARGS
	@$(PY) -m pytest $(PYTEST_ARGS)
else
	@log=$$(mktemp); trap 'rm -f "$$log"' EXIT; failed=0; \
	echo "[1/2] Tests without a cluster, told at the end"; \
	nice -n 10 $(PY) -m pytest --quiet --numprocesses 1 -m "not ray" >"$$log" 2>&1 & other=$$!; \
	echo "[2/2] Tests on a local Ray"; \
	$(PY) -m pytest --quiet --numprocesses 2 --dist loadgroup -m ray || failed=1; \
	wait $$other || failed=1; \
	echo "[1/2] Tests without a cluster"; cat "$$log"; \
	exit $$failed
endif

check: check-format check-lint check-types check-imports check-proto

check-format: env
	@echo "Format"
	@$(PY) -m ruff format --check --quiet .

check-lint: env
	@echo "Lint"
	@$(PY) -m ruff check --quiet .

check-types: env
	@echo "Types"
	@$(PY) -m mypy --no-error-summary

check-imports: env
	@echo "Import contracts"
	@.venv/bin/lint-imports --no-logo

check-proto: env
	@echo "Generated stubs"
	@$(PY) scripts/proto.py --check

format: env
	@$(PY) -m ruff check --fix --quiet . || true
	@$(PY) -m ruff format .

proto: env
	@$(PY) scripts/proto.py
