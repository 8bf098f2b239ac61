# Two commands do everything on a fresh machine: `make run` and `make test`.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help run test chaos lint setup-run setup-test

help: ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk 'BEGIN {FS = ":.*## "} {printf "  make %-12s %s\n", $$1, $$2}'

run: setup-run ## Build and run the whole platform on this machine, with a simulated site
	cargo build --release --locked --package throughline-platform
	exec ./target/release/throughline up $(ARGS)

test: setup-test lint ## Install what the tests need, then run format, lints and all tests on real components
	cargo build --locked --workspace --all-targets
	PATH="$(CURDIR)/target/venv/bin:$$PATH" cargo test --locked --workspace --no-fail-fast

chaos: setup-test ## Kill roles and Kafka under load, then compare everything (10 minutes, not part of test)
	cargo build --locked --workspace
	cargo test --locked --package throughline-tests --features chaos --test killed_roles -- --test-threads=1

lint: ## Check format and lints
	cargo fmt --all --check
	cargo clippy --locked --workspace --all-targets -- -D warnings

setup-run:
	@scripts/setup run

setup-test:
	@scripts/setup test
