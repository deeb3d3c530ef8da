.DEFAULT_GOAL := help
.PHONY: help demo dashboard test test-servers soak chaos chaos-agent reverts mutants fuzz loom lint bench bench-peers clean

# Every target that needs a server starts its own; this finds or installs the binary.
with_server = server=$$(scripts/ensure-server) && SHARDLOCK_REDIS_SERVER=$$server
features = $(shell sed -n '/^\[features\]/,/^\[[^f]/s/^\([a-z0-9_-]*\) = .*/\1/p' Cargo.toml | grep -vx default)

# Most tests wait for servers, leases and each other, so three run at a time per core. With many
# more, processes have no CPU time for hundreds of milliseconds, and leases end.
test_threads = $(shell cores=$$(getconf _NPROCESSORS_ONLN); threads=$$((3 * cores)); [ $$threads -le 16 ] || threads=16; [ $$threads -ge $$cores ] || threads=$$cores; echo $$threads)
test test-servers: export RUST_TEST_THREADS ?= $(test_threads)

help: ## List the targets.
	@sed -n 's/^\([a-z-]*\): .*## \(.*\)/  make \1	\2/p' Makefile

demo: cargo ## Show workers of several processes competing for the same keys on a real server.
	@$(with_server) cargo run --release --locked --package shardlock-cli -- demo

dashboard: cargo ## Run a load and a Prometheus for the dashboard of grafana/, and print how to connect a Grafana.
	@$(with_server) && SHARDLOCK_PROMETHEUS=$$(scripts/ensure-prometheus) && export SHARDLOCK_REDIS_SERVER SHARDLOCK_PROMETHEUS && \
	cargo build --release --locked --package shardlock-cli && exec scripts/dashboard target/release/shardlock --tasks 16

test: cargo protoc ## Run all tests, against real servers.
	@server=$$(scripts/ensure-server) && etcd=$$(scripts/ensure-etcd) && prometheus=$$(scripts/ensure-prometheus) && python=$$(scripts/ensure-grafana-model) && clients=$$(scripts/ensure-clients) && \
	SHARDLOCK_POSTGRES=$$(scripts/ensure-postgres) && SHARDLOCK_RABBITMQ=$$(scripts/ensure-rabbitmq) && export SHARDLOCK_POSTGRES SHARDLOCK_RABBITMQ && \
	SHARDLOCK_REDIS_SERVER=$$server SHARDLOCK_ETCD_SERVER=$$etcd SHARDLOCK_PROMETHEUS=$$prometheus SHARDLOCK_PYTHON=$$python SHARDLOCK_CLIENTS=$$clients cargo test --locked --workspace --all-features --no-fail-fast && \
	$(with_leases_kept) && (cd benches/peers && $$python -B -m unittest -q)

# The behaviours of single locks again, with leases that linger. The skipped tests are those whose
# outcome linger changes: see tests/README.md.
with_leases_kept = SHARDLOCK_TEST_LINGER=30 SHARDLOCK_REDIS_SERVER=$$server cargo test --locked --workspace --all-features --no-fail-fast \
	--test it -- basics:: order:: tokens:: cancellation:: \
	--skip on_sentinel --skip on_cluster --skip on_redlock --skip on_etcd --skip on_mixed \
	--skip holding_a_key_locks_only --skip namespace_prefixes_every_name --skip try_does_not_overtake --skip old_guard_of_a_deleted_lease \
	--skip tokens_grow_across_processes_flushes --skip a_manager_that_outlives --skip counter_that_went_back --skip request_with_a_zero_timeout

# TESTS selects tests, as in TESTS="--test it -- basics:: order::".
test-servers: cargo protoc ## Run all tests against each server: the default, Valkey 9, Redis 8.
	@etcd=$$(scripts/ensure-etcd) && prometheus=$$(scripts/ensure-prometheus) && python=$$(scripts/ensure-grafana-model) && clients=$$(scripts/ensure-clients) && SHARDLOCK_POSTGRES=$$(scripts/ensure-postgres) && SHARDLOCK_RABBITMQ=$$(scripts/ensure-rabbitmq) || exit; \
	export SHARDLOCK_POSTGRES SHARDLOCK_RABBITMQ; \
	export SHARDLOCK_ETCD_SERVER=$$etcd SHARDLOCK_PROMETHEUS=$$prometheus SHARDLOCK_PYTHON=$$python SHARDLOCK_CLIENTS=$$clients; failed=; for server in "" valkey redis8; do \
		name=$${server:-default}; \
		path=$$(scripts/ensure-server $$server) || { failed="$$failed $$name (not available)"; continue; }; \
		echo "== $$name: $$("$$path" --version)"; \
		SHARDLOCK_REDIS_SERVER=$$path cargo test --locked --workspace --all-features --no-fail-fast $(TESTS) || failed="$$failed $$name"; \
	done; \
	if [ -n "$$failed" ]; then echo "failed:$$failed" >&2; exit 1; fi; \
	echo "the tests passed against all three servers"

SECONDS_OF_SOAK = 3600
soak: cargo ## Simulate new seeds for an hour or SECONDS_OF_SOAK=N; a failure is shown with its shortest history.
	SIMULATION_SECONDS=$(SECONDS_OF_SOAK) SIMULATION_FROM=$${SIMULATION_FROM:-$$(date +%s)000} cargo test --release --locked --lib -- --exact simulation::soak --nocapture

# MINUTES, SEED, KINDS="redis etcd" and FAULTS="switch-over late-requests" configure it: see
# docs/reliability.md.
MINUTES ?= 60
chaos: cargo protoc ## Compete for locks on servers of every kind under faults, for MINUTES=60, and check the history.
	@$(with_server) && SHARDLOCK_ETCD_SERVER=$$(scripts/ensure-etcd) && export SHARDLOCK_REDIS_SERVER SHARDLOCK_ETCD_SERVER && \
	SHARDLOCK_TEST_CHAOS_MINUTES=$(MINUTES) SHARDLOCK_TEST_CHAOS_SEED=$(SEED) SHARDLOCK_TEST_CHAOS_KINDS="$(KINDS)" SHARDLOCK_TEST_CHAOS_FAULTS="$(FAULTS)" \
	cargo test --locked --all-features --test chaos -- --exact chaos_for_the_requested_time --nocapture || exit 1

chaos-agent: cargo protoc ## The same with an agent and its clients, for MINUTES=60.
	@$(with_server) && export SHARDLOCK_REDIS_SERVER && \
	SHARDLOCK_TEST_CHAOS_MINUTES=$(MINUTES) SHARDLOCK_TEST_CHAOS_SEED=$(SEED) SHARDLOCK_TEST_CHAOS_FAULTS="$(FAULTS)" \
	cargo test --locked --all-features --package shardlock-cli --test cli -- --exact serve::chaos::chaos_for_the_requested_time --nocapture || exit 1

# FIXES selects fixes by parts of their names, as in FIXES="forged outage".
reverts: cargo protoc ## Undo each fix of tests/reverts.toml in turn and check that a test fails without it.
	@server=$$(scripts/ensure-server) && etcd=$$(scripts/ensure-etcd) && \
	SHARDLOCK_REDIS_SERVER=$$server SHARDLOCK_ETCD_SERVER=$$etcd scripts/reverts $(FIXES)

# MUTANTS selects mutants, as in MUTANTS="--file src/lease.rs": see `cargo mutants --help`.
# Survivors with a reason are in .cargo/mutants.toml and src/store/redis/scripts/survivors.txt.
mutants: cargo protoc ## Make every small change to the safety core, and check that a test fails for each.
	@command -v python3 >/dev/null || { echo "python3 is not on the PATH: install Python 3.9 or later" >&2; exit 1; }
	@cargo mutants --version >/dev/null 2>&1 || { echo "install it with: cargo install --locked cargo-mutants" >&2; exit 1; }
	@$(with_server) && export SHARDLOCK_REDIS_SERVER && \
	SIMULATION_SEEDS=0..200 cargo mutants --no-shuffle $(MUTANTS) && scripts/mutate-lua

# Built apart from the rest, since the flag changes the library.
loom: cargo protoc ## Execute what threads share outside the mutex of a key in every order.
	RUSTFLAGS="--cfg shardlock_loom" CARGO_TARGET_DIR=$${CARGO_TARGET_DIR:-target}/loom cargo test --locked --lib -- models::

lint: cargo protoc ## Check formatting, lints with each feature and with all, documentation, dependencies.
	cargo fmt --all -- --check
	scripts/reverts --check
	scripts/check-packages
	cargo clippy --locked --all-targets --package shardlock -- -D warnings
	@set -e; for f in $(features); do set -x; cargo clippy --locked --all-targets --package shardlock --features $$f -- -D warnings; { set +x; } 2>/dev/null; done
	cargo clippy --locked --all-targets --package shardlock-cli -- -D warnings
	cargo clippy --locked --workspace --all-targets --all-features -- -D warnings
	RUSTDOCFLAGS="-D warnings" cargo doc --locked --no-deps --all-features
	@deny=$$(scripts/ensure-cargo-deny) && set -x && $$deny --locked check bans licenses sources

# SECONDS is the time per target, TARGETS selects targets: see fuzz/README.md.
fuzz: cargo protoc ## Fuzz every parser of external input for 600 s each; installs cargo-fuzz if it is missing.
	@scripts/fuzz $(or $(SECONDS),600) $(TARGETS)

bench: cargo protoc ## Run the benchmarks.
	@$(with_server) cargo bench --locked --all-features

# PEERS has options, as in PEERS="--only rslock,fan-in-8 --seconds 2 --repeat 1": see
# benches/peers/run.py --help.
bench-peers: ## Compare with other libraries under the same loads; writes benches/RESULTS.md and its plots.
	@command -v python3 >/dev/null || { echo "python3 is not on the PATH: install Python 3.9 or later" >&2; exit 1; }
	@cd benches/peers && python3 -B -m unittest -q
	@python3 -B benches/peers/run.py $(PEERS)

clean: ## Remove build output and the servers installed here.
	rm -rf target .servers

.PHONY: cargo protoc
# Needed to build the feature etcd.
protoc:
	@scripts/ensure-protoc

cargo:
	@command -v cargo >/dev/null || { echo "cargo is not on the PATH: install Rust 1.89 or later, see https://rustup.rs" >&2; exit 1; }
