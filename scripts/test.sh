#!/usr/bin/env bash
# Runs every test there is. Arguments go to the test runner, for instance a name to filter by.
# Installs what is missing first (scripts/setup.sh); needs Rust, and root or sudo for that once.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."

scripts/setup.sh

# The end-to-end tests run the programs as a user would. Built together with the tests, so that no
# dependency is built twice with different features.
cargo build --locked --workspace --bins --tests

# Clusters and servers of several tests share the machine: more at once only makes each slower.
if [ -z "${HIGHWATER_TEST_THREADS:-}" ]; then
  HIGHWATER_TEST_THREADS="$(($(nproc) + 1))"
fi

# Tests that this machine does not allow say so here.
HIGHWATER_TEST_SKIPPED="$(mktemp)"
export HIGHWATER_TEST_SKIPPED
chmod 666 "$HIGHWATER_TEST_SKIPPED"
trap 'cat "$HIGHWATER_TEST_SKIPPED" >&2; rm -f "$HIGHWATER_TEST_SKIPPED"' EXIT

if cargo nextest --version >/dev/null 2>&1; then
  cargo nextest run --locked --workspace --test-threads "$HIGHWATER_TEST_THREADS" --no-fail-fast "$@"
else
  cargo test --locked --workspace --bins --lib --tests --no-fail-fast -- --test-threads "$HIGHWATER_TEST_THREADS" "$@"
fi
# nextest does not run the examples in the documentation; a filter is not meant for them.
if [ "$#" -eq 0 ]; then
  cargo test --locked --workspace --doc
fi
