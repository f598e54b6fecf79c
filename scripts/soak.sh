#!/usr/bin/env bash
# Random fault schedules against real PostgreSQL: kills, stops, frozen and failing regions, lost replies, promotions,
# several at a time, and at the end of each the loss of the machine: at once, or after everything had to be caught up
# with. Then restores from the regions as they were at the last promise, to the end and to a moment in between,
# compared with a ledger of acknowledged commits. An agent that ends by itself is a failure too. Stops at the first loss, names its seed, and keeps everything.
#
#   scripts/soak.sh [--minutes N | --schedules N] [--seed S] [--length SECONDS] [--jobs N]
#   scripts/soak.sh --frozen MINUTES      both regions hang under load: memory, status messages, recovery
#
# The evidence of a failure goes to --keep DIR (default: target/soak).
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
scripts/setup.sh
cargo build --locked --workspace --bins --tests
target="${CARGO_TARGET_DIR:-target}"
mkdir -p "$target/soak"
exec "$target/debug/highwater-soak" --keep "$target/soak" "$@"
