# Every target first makes .venv where it is missing or stale; nothing else has to be prepared.
SHELL := /bin/sh
PY := .venv/bin/python
KERNELS_PY := .venv-kernels/bin/python
SITE_PY := .venv-site/bin/python
export PYTHON

.PHONY: help bench env kernels-env deploy-env clients-env serve test test-alone test-cluster test-kernels test-long check check-format check-lint check-types check-imports check-proto check-docs check-chart format proto proto-baseline docs site-env site

help:
	@echo "make serve         start the service on this machine; Ctrl-C stops it"
	@echo "make test          run the tests (PYTEST_ARGS='-m \"not ray\"' for a part of them)"
	@echo "make test-alone    those without a cluster, the quick part"
	@echo "make test-cluster  those on a local Ray, and slow ones"
	@echo "make test-kernels  those of the real kernel packages, which need no GPU but .venv-kernels"
	@echo "make test-long     further cases of some of them, half an hour; in no other target, nor in CI"
	@echo "make bench         measure README's table anew, some two hours on two idle cores; into build/bench"
	@echo "make check         formatting, lint, types, import contracts, drift of stubs and of docs, broken protos"
	@echo "make format        format the code and mend what lint can mend"
	@echo "make proto         regenerate twotower/pb from protos/"
	@echo "make proto-baseline  at a release: what protos/ says is what later versions may not break"
	@echo "make docs          write what is made from code: tables of docs/, files of deploy/"
	@echo "make site          the documents as a site in build/site; a link or an anchor that leads nowhere is an error"
	@echo "make env           only make the environment"
	@echo "make deploy-env    make .venv-deploy: helm, hadolint and Kubernetes' schemas, for what deploy/ is checked with"
	@echo "make clients-env   make .venv-clients: LiteLLM, LangChain, lm-eval and clients for Node, for tests of the interfaces"

env:
	@sh scripts/bootstrap.sh

serve: env
	@echo "Starting the service; Ctrl-C stops it"
	@exec $(PY) -m cluster up

# All parts, whatever one of them says: one run shows everything there is to mend.
test: env
ifdef PYTEST_ARGS
	@$(PY) -m pytest $(PYTEST_ARGS)
else
	@$(MAKE) --no-print-directory --keep-going test-alone test-cluster test-kernels
endif

# What fails is run once more, alone: see there.
test-alone: env
	@echo "[1/3] Tests without a cluster, but for slow ones"
	@$(PY) scripts/run_tests.py alone

test-cluster: env
	@echo "[2/3] Tests on a local Ray, and slow ones"
	@$(PY) scripts/run_tests.py cluster

# Triton's interpreter is chosen for a whole process, and these packages are built without CUDA: nothing of it may
# reach .venv.
kernels-env:
	@sh scripts/bootstrap.sh kernels_env.py

test-kernels: kernels-env
	@echo "[3/3] Tests of the real kernels"
	@$(KERNELS_PY) -m pytest --quiet --numprocesses 2 --dist worksteal tests/kernels

test-long: env
	@$(PY) -m pytest --quiet --numprocesses 2 --dist loadfile --no-loadscope-reorder -m "long and not kernels"

bench: env
	@$(PY) -m benchmarks

# Without a cluster. Tests that need it are skipped where it is not there.
deploy-env:
	@sh scripts/bootstrap.sh deploy_env.py

# Without it, tests that ask the service with other people's clients are skipped.
clients-env:
	@sh scripts/bootstrap.sh clients_env.py

check: check-format check-lint check-types check-imports check-proto check-docs check-chart

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
	@$(PY) scripts/compatibility.py --check
	@$(PY) scripts/grpc_reference.py --check

check-docs: env
	@echo "Generated tables, rules and dashboard"
	@$(PY) scripts/tables.py --check
	@$(PY) scripts/observability.py --check

check-chart: env
	@echo "What the Helm chart makes"
	@$(PY) scripts/chart.py --check

format: env
	@$(PY) -m ruff check --fix --quiet . || true
	@$(PY) -m ruff format .

proto: env
	@$(PY) scripts/proto.py

proto-baseline: env
	@$(PY) scripts/compatibility.py

docs: env
	@$(PY) scripts/tables.py
	@$(PY) scripts/grpc_reference.py
	@$(PY) scripts/observability.py
	@$(PY) scripts/chart.py

site-env:
	@sh scripts/bootstrap.sh site_env.py

# Documents are few, so all are read anew: a page that is not read again does not check its links.
site: site-env
	@echo "The site of the documents"
	@$(SITE_PY) -m sphinx -q -W --keep-going -E -c docs/site . build/site
