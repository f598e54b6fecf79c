#!/usr/bin/env bash
# Made the archives beside it, and is kept to say how: what is there is never made anew. A later version of the format gets
# a directory of its own, made by the programs that wrote it first.
#
#   make.sh POSTGRESQL_BIN PROGRAMS TO       as the account that PostgreSQL is to run under; psql comes from PATH
#
# Timeline 1 holds rows 1 to 300 of the table `ledger`, of which 100 were there before the base backup; behind row 200 there
# is the restore point `two hundred`, where timeline 2 begins, with rows 1001 to 1050. The newest segment of both consists of
# tail chunks.
set -euo pipefail

pg_bin="$1" programs="$2" to="$3"
work="$(mktemp -d)"
trap 'for data in "$work"/one "$work"/two; do "$pg_bin"/pg_ctl -D "$data" -m immediate stop >/dev/null 2>&1 || true; done
      kill $(jobs -p) 2>/dev/null || true; rm -rf "$work"' EXIT
mkdir -p "$to" "$work/socket"

sql() { psql -XqAt -v ON_ERROR_STOP=1 -h "$work/socket" -U postgres -d postgres -c "$1"; }
rows() { sql "INSERT INTO ledger SELECT n, 'row ' || n FROM generate_series($1, $2) n"; }

# The position comes from the server, the answer from a listing of what is stored.
durable() {
  local end
  sql "SELECT pg_current_xact_id()" >/dev/null
  end="$(sql "SELECT pg_current_wal_flush_lsn()")"
  until [ "$(sql "SELECT count(*) FROM pg_replication_slots WHERE restart_lsn >= '$end'")" = 1 ]; do sleep 0.1; done
}

stream() {
  "$programs/highwater-agent" --config "$work/agent.toml" run 2>>"$work/agent.log" &
  streaming=$!
  until sql "SELECT count(*) FROM pg_replication_slots WHERE active" | grep -q 1; do sleep 0.1; done
}

leave() {
  kill "$streaming"
  wait "$streaming"
}

agent() { "$programs/highwater-agent" --config "$work/agent.toml" "$@"; }
restore() { "$programs/highwater-restore" --config "$work/agent.toml" "$@"; }

cat >"$work/agent.toml" <<END
[cluster]
name = "orders"
connection = "host=$work/socket user=postgres dbname=postgres"
[[region]]
name = "here"
url = "file://$to"
[wal]
flush_interval = "200ms"
[pulse]
interval = "1s"
[admin]
listen = "off"
END

"$pg_bin/initdb" -D "$work/one" -U postgres -A trust -E UTF8 --locale=C --wal-segsize=1 >/dev/null
cat >>"$work/one/postgresql.conf" <<END
listen_addresses = ''
unix_socket_directories = '$work/socket'
autovacuum = off
max_wal_size = 32MB
min_wal_size = 2MB
END
"$pg_bin/pg_ctl" -D "$work/one" -l "$work/log" -w start >/dev/null
# A small cluster has one database.
for name in template0 template1; do
  sql "UPDATE pg_database SET datistemplate = false WHERE datname = '$name'"
  sql "DROP DATABASE $name"
done
sql "CREATE TABLE ledger (n int PRIMARY KEY, note text NOT NULL); CHECKPOINT; SELECT pg_switch_wal()" >/dev/null

stream
rows 1 100
durable
agent backup >"$work/backup"
rows 101 200
sql "SELECT pg_create_restore_point('two hundred')" >/dev/null
sleep 2
moment="$(sql "SELECT to_char(clock_timestamp() AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.US\"Z\"')")"
sleep 1
sql "SELECT pg_switch_wal()" >/dev/null
rows 201 300
durable
leave
"$pg_bin/pg_ctl" -D "$work/one" -m immediate stop >/dev/null

restore run --start --bin "$pg_bin" --into "$work/two" --to-name "two hundred" >"$work/restore"
stream
rows 1001 1050
durable
leave
echo "behind row 200, before row 201: $moment"
cat "$work/backup" "$work/restore"
