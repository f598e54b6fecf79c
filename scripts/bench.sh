#!/usr/bin/env bash
# Measures Highwater against pg_receivewal, pg_basebackup, tar, cp and (where installed) pgBackRest, side by side on
# the same data, and prints wall time, CPU seconds per GB and peak memory as ratios.
#
#   scripts/bench.sh wal | backup | restore | replay [--scale N] [--segments N] [--runs N] [--only TEXT] [--tls] [--with-pgbackrest]
#   scripts/bench.sh lag [--samples N]       from a commit to its durability in both regions
#   scripts/bench.sh drain [--segments N]    memory while a backlog drains and a region is frozen
#   scripts/bench.sh stop [--runs N]         how long PostgreSQL takes to stop under the agent
#   scripts/bench.sh sync [--samples N]      commits that wait for both regions, beside pg_receivewal --synchronous
#
# --with-pgbackrest installs the Debian package first; --tls lets it use S3 too. The full size needs about 30 GB in
# $TMPDIR (default /tmp) and, for the S3 endpoints, 4 GB of memory; --scale 10 --segments 8 is quick. Nothing is left.
# For work on Highwater itself: BIN_DIR=DIR uses programs built already, PG_BIN=DIR another PostgreSQL.
# shellcheck disable=SC2154  # variables of lib/common.sh
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/lib/common.sh
. scripts/lib/common.sh

install_package() { # package, command
  ! have "$2" || return 0
  local sudo=()
  [ "$(id -u)" -eq 0 ] || sudo=(sudo)
  "${sudo[@]}" apt-get update -q >/dev/null
  "${sudo[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends "$1" >/dev/null
}

arguments=()
for argument in "$@"; do
  case "$argument" in
  --with-pgbackrest) install_package pgbackrest pgbackrest ;;
  *) arguments+=("$argument") ;;
  esac
done
install_package python3 python3
export PYTHONDONTWRITEBYTECODE=1
case " ${arguments[*]-} " in
*" -h "* | *" --help "* | "  ") exec python3 scripts/bench/main.py "${arguments[@]:---help}" ;;
esac

prepare_programs
find_postgres
choose_user
# With these two bash waits for the program below, which ends what it started, before it removes the directory.
trap 'exit 143' TERM HUP
trap 'exit 130' INT
trap '[ -z "${work:-}" ] || rm -rf "$work"' EXIT
make_work_directory highwater-bench highwater-agent highwater-restore highwater-s3
say "PostgreSQL $pg_version as user $user in $work"
export BENCH_WORK="$work" BENCH_PG_BIN="$pg_bin" BENCH_USER="$user"
python3 scripts/bench/main.py "${arguments[@]}"
