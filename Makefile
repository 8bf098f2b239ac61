# Two commands do everything on a fresh machine: `make run` and `make test`.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help run test chaos sabotage fuzz lint setup-run setup-test setup-chaos

help: ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk 'BEGIN {FS = ":.*## "} {printf "  make %-12s %s\n", $$1, $$2}'

run: setup-run ## Build and run the whole platform on this machine, with a simulated site
	cargo build --release --locked --package throughline-platform
	exec ./target/release/throughline up $(ARGS)

test: setup-test lint ## Install what the tests need, then run format, lints and all tests on real components
	cargo build --locked --workspace --all-targets
	# Most tests wait for others most of the time.
	PATH="$(CURDIR)/target/venv/bin:$$PATH" RUST_TEST_THREADS=3 cargo test --locked --workspace --no-fail-fast

SEEDS ?= 1 2 3 4 5 6
MINUTES ?= 5
chaos: setup-chaos ## Long runs under faults with the release build; SEEDS="1 2 database_down" MINUTES=5; the journal is docs/reliability.jsonl
	cargo build --release --locked --package throughline-platform
	cargo build --locked --workspace --all-targets
	PATH="$(CURDIR)/target/venv/bin:$$PATH" PLATFORM_BINARY="$(CURDIR)/target/release/throughline" PLATFORM_BUILD=release \
	  target/debug/chaos $(MINUTES) $(SEEDS)

sabotage: setup-test ## Show that the run under faults can fail: builds broken on purpose must be noticed; TIMES=1 CHOICES="none skip_compare"; the journal is docs/sabotage.jsonl
	PATH="$(CURDIR)/target/venv/bin:$$PATH" TIMES="$(TIMES)" CHOICES="$(CHOICES)" scripts/sabotage

TARGET ?= publish
SECONDS ?= 60
fuzz: ## Let a fuzzer look for inputs that break a parser; TARGET=publish SECONDS=60; the targets are in docs/fuzzing.md
	@cargo +nightly --version >/dev/null 2>&1 || { echo "fuzzing needs a nightly compiler: rustup toolchain install nightly"; exit 1; }
	@cargo +nightly fuzz --version >/dev/null 2>&1 || { echo "fuzzing needs cargo-fuzz: cargo install --locked cargo-fuzz"; exit 1; }
	@test -f "fuzz/fuzz_targets/$(TARGET).rs" || { echo "no target '$(TARGET)'; there are:"; ls fuzz/fuzz_targets | sed 's/\.rs$$//'; exit 1; }
	mkdir -p "fuzz/target/found/$(TARGET)"
	# cargo-fuzz sets RUSTFLAGS, which hides those of .cargo/config.toml.
	RUSTFLAGS="-C link-arg=-Wl,--wrap=rd_kafka_broker_ApiVersion_supported,--wrap=rd_kafka_coord_req,--wrap=rd_kafka_coord_cache_expire" \
	  cargo +nightly fuzz run --sanitizer none "$(TARGET)" "fuzz/target/found/$(TARGET)" "fuzz/corpus/$(TARGET)" -- \
	  -max_total_time=$(SECONDS) -timeout=5 -rss_limit_mb=2048 -max_len=8192

lint: ## Check format and lints
	cargo fmt --all --check
	cargo clippy --locked --workspace --all-targets -- -D warnings

setup-run:
	@scripts/setup run

setup-test:
	@scripts/setup test

setup-chaos:
	@scripts/setup chaos
