#!/usr/bin/env bash
# shellcheck disable=SC2034,SC2154  # it shares variables with what it sources
# Shows the main job on this machine, for real and from nothing: archive a busy PostgreSQL into two regions, make a
# mistake, lose a region and then the machine, and get the data back. Needs Debian or Ubuntu with Rust, and root or
# sudo for what setup.sh installs. Ends with exit code 1 if anything was lost that had been reported as stored.
#
#   --seconds N   length of each stretch of work (default 8)
#   --keep        leave the restored servers and the region running, and say how to play with them
#
# For work on Highwater itself: BIN_DIR=DIR uses programs built already, PG_BIN=DIR another PostgreSQL.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/lib/common.sh
. scripts/lib/common.sh
# shellcheck source=scripts/lib/demo.sh
. scripts/lib/demo.sh

keep=no
seconds=8
while [ "$#" -gt 0 ]; do
  case "$1" in
  --keep) keep=yes ;;
  --seconds)
    [[ "${2:-}" =~ ^[1-9][0-9]*$ ]] || die "--seconds needs a number"
    seconds="$2"
    shift
    ;;
  -h | --help)
    sed -n '3,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"
    exit 0
    ;;
  *)
    printf 'demo.sh: unknown option %s; see --help\n' "$1" >&2
    exit 2
    ;;
  esac
  shift
done

repository="$PWD"
work="" finished=no
pids=()
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

step "Preparing: PostgreSQL, and Highwater's release build"
prepare_programs
find_postgres
choose_user
make_work_directory highwater-demo highwater-agent highwater-restore highwater-s3 highwater-ledger
say "PostgreSQL $pg_version, everything as user $user in $work"
cd "$work"

step "Two regions: two S3 endpoints that share nothing"
start_region first eu-west-1
start_region second eu-central-1

step "A primary, and the agent beside it"
start_primary
cp "$repository/deploy/postgresql/role.sql" .
primary_sql -f role.sql >log/role 2>&1
write_configuration
say "\$ highwater-agent check"
agent check
start_agent

step "Work: pgbench, customers, and a ledger of every commit that PostgreSQL acknowledged"
start_work
phase "work" sleep "$seconds"
phase "base backup into both regions, under load" agent backup
phase "work" sleep "$seconds"
say "\$ highwater-agent status"
agent status || true

step "A mistake"
customers="$(primary_sql -Atc 'SELECT count(*), sum(balance) FROM customers')"
mistake="$(primary_sql -Atc "SELECT to_char(clock_timestamp() AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.US\"Z\"')")"
primary_sql -c 'DROP TABLE customers' >/dev/null
say "$mistake  DROP TABLE customers;   -- it had ${customers%|*} rows; nobody notices"
phase "work" sleep "$seconds"

step "Region eu-west-1 is lost, with all that it held"
end_process KILL "$first_pid"
phase "work" sleep "$seconds"
say "The agent's metrics, $seconds s later:"
show_positions
say "The policy is \"all\": what is reported to PostgreSQL stands still, while eu-central-1 goes on receiving."

step "And now the primary: killed, its disk gone, and the agent with it"
lose_the_machine
say "What is left: region eu-central-1, and the ledger's notes."

step "What can be restored?"
# Without this, nothing is restored "to the end" while a region that may know more cannot be asked.
restore_options=(--without-region eu-west-1)
say "\$ highwater-restore ${restore_options[*]} list"
restore list
say ""
say "\$ highwater-restore ${restore_options[*]} plan --to-time $mistake"
restore plan --to-time "$mistake"

step "Back to just before the mistake"
phase "restore to just before the mistake" restore_into before 5433 --to-time "$mistake"
back="$(restored_sql 5433 -c 'SELECT count(*), sum(balance) FROM customers')"
say "customers is back with ${back%|*} rows"
[ "$back" = "$customers" ] || fail "customers held $customers (rows, sum) and was restored as $back"
compare 5433 --at "$mistake" || fail "the ledger contradicts the restore to $mistake"

step "Again, to the very end"
say "\$ highwater-restore ${restore_options[*]} plan --to-latest"
restore plan --to-latest
phase "restore to the very end" restore_into latest 5434 --to-latest
compare 5434 || fail "something was lost that had been reported as stored"
[ -z "$(restored_sql 5434 -c "SELECT to_regclass('customers')")" ] || fail "customers is there, but it had been dropped"

step "How long it took"
printf '%s' "$phases"
finished=yes
if [ "$failures" -gt 0 ]; then
  say "" "$failures of the promises above were broken"
  exit 1
fi
say ""
say "Nothing was lost that had been reported as stored."
