#!/usr/bin/env bash
# shellcheck disable=SC2034,SC2154  # it shares variables with what sources it
# The parts of demo.sh: starting, losing and looking. Sourced; works in the directory $work.

export NO_PROXY=127.0.0.1 no_proxy=127.0.0.1
phases=""
failures=0

fail() {
  say "  FAILED: $*"
  failures=$((failures + 1))
}

# Runs a program as the unprivileged user, knowing nothing of the caller's PostgreSQL and cloud settings.
as_user() {
  "${run_as[@]}" -i PATH="$PATH" HOME="$work" LANG=C.UTF-8 NO_PROXY=127.0.0.1 "$@"
}

# The same in the background, away from the terminal: Ctrl-C reaches only this script, which then ends everything
# in order. Sets started_pid.
start() { # log, command...
  local log="log/$1"
  shift
  setsid "${run_as[@]}" -i PATH="$PATH" HOME="$work" LANG=C.UTF-8 NO_PROXY=127.0.0.1 "$@" </dev/null >"$log" 2>&1 &
  started_pid=$!
  disown "$started_pid"
  pids+=("$started_pid")
}

agent() { as_user HIGHWATER_LOG=warn bin/highwater-agent --config highwater.toml "$@"; }
restore() { as_user bin/highwater-restore --config highwater.toml "${restore_options[@]}" "$@"; }
restore_options=()
primary_sql() { as_user "$pg_bin/psql" -XqAt -v ON_ERROR_STOP=1 -h "$work/socket" -p 5432 -U postgres -d postgres "$@"; }
restored_sql() { # port, psql arguments...
  local port="$1"
  shift
  as_user "$pg_bin/psql" -XqAt -v ON_ERROR_STOP=1 -h "$work/socket" -p "$port" -U postgres -d postgres "$@"
}

# A restore into a directory of $work, with its server at that port. The plan that `run` shows first was shown already.
restore_into() { # directory, port, target...
  local directory="$1" port="$2"
  shift 2
  say "\$ highwater-restore ${restore_options[*]} run $* --into $work/$directory --start"
  restore run "$@" --into "$work/$directory" --start --bin "$pg_bin" --port "$port" \
    --socket-directory "$work/socket" 2>"log/restore-$directory" || {
    local code=$?
    cat "log/restore-$directory" >&2
    return "$code"
  }
}

phase() { # name, command...
  local name="$1" begin taken
  shift
  begin="$(now_ms)"
  "$@" || die "$name: failed with exit code $?"
  taken=$(($(now_ms) - begin))
  [ "$name" = work ] || phases+="$(printf '  %-50s %3d.%02d s' "$name" $((taken / 1000)) $((taken % 1000 / 10)))"$'\n'
}

start_region() { # first or second, name
  local bucket="orders-$2"
  start "region-$2" bin/highwater-s3 --bucket "$bucket" --key demo --secret demo-secret
  wait_until 10 "region $2 listens" grep -qs '^http' "log/region-$2"
  printf -v "$1_pid" '%s' "$started_pid"
  printf -v "$1_endpoint" '%s' "$(head -n 1 "log/region-$2")"
  say "$2: $(head -n 1 "log/region-$2"), bucket $bucket"
}

start_primary() {
  as_user "$pg_bin/initdb" -D primary -U postgres -A trust -E UTF8 --locale=C >log/initdb
  as_user tee -a primary/postgresql.conf >/dev/null <<CONF
listen_addresses = ''
unix_socket_directories = '$work/socket'
shared_buffers = 64MB
max_wal_size = 256MB
CONF
  as_user "$pg_bin/pg_ctl" -D primary -l log/primary -w start >/dev/null
  say "PostgreSQL listens at the Unix socket $work/socket, port 5432"
}

write_configuration() {
  admin_port="$(free_port)"
  as_user tee highwater.toml >/dev/null <<CONF
[cluster]
name = "orders"
connection = "host=$work/socket port=5432 user=highwater dbname=postgres"

# Keys are written here only because this is a demo: the standard chain (environment, profile, instance role) is better.
[[region]]
name = "eu-west-1"
url = "s3://orders-eu-west-1/demo"
endpoint = "$first_endpoint"
access_key_id = "demo"
secret_access_key = "demo-secret"

[[region]]
name = "eu-central-1"
url = "s3://orders-eu-central-1/demo"
endpoint = "$second_endpoint"
access_key_id = "demo"
secret_access_key = "demo-secret"

[admin]
listen = "127.0.0.1:$admin_port"
CONF
  chmod 0600 highwater.toml
}

agent_is_ready() { http_get "$admin_port" /readyz >/dev/null; }

# What the agent says of its positions, from its metrics; LSNs as PostgreSQL writes them.
show_positions() {
  http_get "$admin_port" /metrics | awk '
    # In halves of 16 bits: not every awk writes 32 bits in hexadecimal.
    function half(word) { return word < 65536 ? sprintf("%X", word) : sprintf("%X%04X", word / 65536, word % 65536) }
    function lsn(bytes) { return half(int(bytes / 4294967296)) "/" half(bytes % 4294967296) }
    function name(text) { sub(/.*region="/, "", text); sub(/".*/, "", text); return text }
    /^highwater_durable_lsn /       { durable = lsn($2) }
    /^highwater_server_lsn /        { server = lsn($2) }
    /^highwater_region_stored_lsn/  { stored[name($1)] = lsn($2) }
    /^highwater_region_up/          { up[name($1)] = $2 }
    END {
      printf "  PostgreSQL has written       %s\n", server
      for (region in stored) printf "  %-13s holds          %s%s\n", region, stored[region], up[region] ? "" : "   (does not answer)"
      printf "  reported to PostgreSQL       %s\n", durable
    }'
}

start_agent() {
  start agent bin/highwater-agent --config highwater.toml run
  agent_pid="$started_pid"
  wait_until 30 "the agent streams" agent_is_ready
  say "The agent streams. Its metrics: http://127.0.0.1:$admin_port/metrics"
}

start_work() {
  as_user "$pg_bin/pgbench" -q -i -s 10 -h "$work/socket" -p 5432 -U postgres postgres >log/pgbench-init 2>&1
  primary_sql -c "CREATE TABLE customers AS SELECT id, md5(id::text) AS name, id % 997 AS balance FROM generate_series(1, 100000) id"
  start pgbench "$pg_bin/pgbench" -n -c 4 -j 2 -R 1000 -T 86400 -h "$work/socket" -p 5432 -U postgres postgres
  start ledger bin/highwater-ledger note --connection "host=$work/socket port=5432 user=postgres dbname=postgres" --notes "$work/ledger"
  wait_until 10 "the ledger grows" grep -qs '^commit' ledger
  say "pgbench offers 1000 transactions a second; four more clients fill the ledger."
}

lose_the_machine() {
  local postmaster backends=()
  postmaster="$(head -n 1 primary/postmaster.pid)"
  # One line, without its end.
  read -r -a backends <"/proc/$postmaster/task/$postmaster/children" || true
  end_process KILL "$agent_pid" "$postmaster" "${backends[@]}"
  rm -rf primary
}

compare() { # port, further arguments...
  local port="$1"
  shift
  say "The ledger's notes, compared with what was restored:"
  as_user bin/highwater-ledger compare --notes ledger --connection "host=$work/socket port=$port user=postgres dbname=postgres" "$@"
}

# The postmasters of the primary and of the restored servers, as far as they run.
postmasters() {
  local directory
  for directory in primary before latest; do
    head -n 1 "$work/$directory/postmaster.pid" 2>/dev/null || true
  done
}

clean_up() {
  local code=$?
  trap '' INT TERM HUP
  [ -n "$work" ] || exit "$code"
  cd /
  if [ "$keep" = yes ] && [ "$finished" = yes ]; then
    say_how_to_play
    exit "$code"
  fi
  if [ "$finished" = no ] && [ "$code" -lt 128 ]; then
    say "The demo did not get to its end. Last words of the agent:" "$(tail -n 15 "$work/log/agent" 2>/dev/null | cut -c 1-300)" >&2
  fi
  # SIGQUIT is PostgreSQL's immediate shutdown.
  # shellcheck disable=SC2046
  end_process QUIT $(postmasters)
  end_process TERM "${pids[@]}"
  rm -rf "$work"
  exit "$code"
}

say_how_to_play() {
  local surviving="${pids[*]}"
  cat >"$work/stop.sh" <<STOP
#!/bin/sh
# Ends what the demo left running, and removes it.
for directory in before latest another; do
  kill -QUIT "\$(head -n 1 "$work/\$directory/postmaster.pid" 2>/dev/null)" 2>/dev/null
done
kill $surviving 2>/dev/null
sleep 1
rm -rf "$work"
STOP
  chmod 0755 "$work/stop.sh"
  local sudo=""
  [ "$(id -u)" -ne 0 ] || sudo="setpriv --reuid=$user --regid=$(id -g "$user") --clear-groups "
  cat <<PLAY

Everything is left running in $work. To play with it:
  just before the mistake   psql -h $work/socket -p 5433 -U postgres
  the very end              psql -h $work/socket -p 5434 -U postgres
  configuration             $work/highwater.toml (region eu-west-1 is lost, eu-central-1 lives in memory)
  what can be restored      $work/bin/highwater-restore --config $work/highwater.toml ${restore_options[*]} list
  every object checked      $work/bin/highwater-restore --config $work/highwater.toml ${restore_options[*]} verify
  another moment            $sudo$work/bin/highwater-restore --config $work/highwater.toml ${restore_options[*]} run \\
                              --to-time TIME --into $work/another --start --port 5435 --socket-directory $work/socket
  logs and ledger           $work/log, $work/ledger
  end it all                $work/stop.sh
PLAY
}
