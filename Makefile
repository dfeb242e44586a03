# Recipes that people and .ci/run call. `make` alone lists them.
SHELL := /bin/bash
CHECKS := .venv-checks/bin
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help lint format layers types audit test-unit test-contract test-live test demo settings clean

help: ## list the recipes
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/\1\t\2/p' Makefile | expand -t 16

.venv-checks/.ready: .ci/checks.txt
	python3 -m venv .venv-checks
	$(CHECKS)/pip install -q -r .ci/checks.txt
	@touch $@

.venv/.ready: pyproject.toml
	python3 -m venv .venv
	$(BIN)/pip install -q -e '.[dev]'
	@touch $@

lint: .venv-checks/.ready ## ruff: rules and format
	$(CHECKS)/ruff check --output-format concise .
	$(CHECKS)/ruff format --check .

format: .venv-checks/.ready ## ruff: mend what it can, format
	$(CHECKS)/ruff check --fix .
	$(CHECKS)/ruff format .

layers: .venv-checks/.ready ## import contracts between packages and rooms
	$(CHECKS)/lint-imports

types: .venv/.ready ## mypy, strict
	$(BIN)/mypy

audit: .venv/.ready .venv-checks/.ready ## dependencies as declared, no secrets in the tree
	$(BIN)/python .ci/dependencies.py
	$(CHECKS)/python .ci/secrets_scan.py

test-unit: .venv/.ready ## minutes; starts no server
	$(BIN)/python -m pytest -n auto --dist worksteal tests/unit

test-contract: .venv/.ready ## one suite per protocol over all its implementations
	$(BIN)/python -m pytest tests/contract

test-live: .venv/.ready ## real Kafka, Valkey and Milvus Lite, started by the tests
	$(BIN)/python -m pytest tests/live

test: .venv/.ready ## everything
	$(BIN)/python -m pytest -n auto --dist worksteal

demo: .venv/.ready ## the whole loop, and a report
	$(BIN)/mimstream demo

settings: .venv/.ready ## write the table of settings into deploy/settings.md
	{ sed '/^|/,$$d' deploy/settings.md; $(BIN)/mimstream settings --markdown; } > deploy/settings.md.new
	mv deploy/settings.md.new deploy/settings.md

clean: ## remove environments and caches
	rm -rf .venv .venv-checks build *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
