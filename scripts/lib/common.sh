#!/usr/bin/env bash
# shellcheck disable=SC2034,SC2154  # it shares variables with what sources it
# What demo.sh and bench.sh share: messages, programs, the PostgreSQL to use, the account that runs it.
# Sourced with the repository as current directory.

say() { printf '%s\n' "$*"; }
step() { printf '\n\033[1m== %s\033[0m\n' "$*" | plain_unless_terminal; }
plain_unless_terminal() { if [ -t 1 ]; then cat; else sed $'s/\033\\[[0-9]*m//g'; fi; }
die() {
  printf '%s: %s\n' "$(basename "$0")" "$*" >&2
  exit 3
}
have() { command -v "$1" >/dev/null 2>&1; }

# Installs what is missing and builds the programs; sets bin_dir. BIN_DIR names a directory with programs that are
# built already (for work on Highwater itself) and leaves both out.
prepare_programs() {
  if [ -n "${BIN_DIR:-}" ]; then
    bin_dir="$(cd "$BIN_DIR" && pwd)"
    return
  fi
  if ! have cargo && [ -f "$HOME/.cargo/env" ]; then
    # shellcheck source=/dev/null
    . "$HOME/.cargo/env"
  fi
  have cargo || die "Rust is missing: install it from https://rustup.rs and run this again"
  # Only the distribution's own PostgreSQL: the other major versions are for the tests.
  HIGHWATER_PG_MAJORS="${HIGHWATER_PG_MAJORS:- }" scripts/setup.sh | sed '/PostgreSQL ready: none/d'
  cargo build --release --locked -p highwater-agent -p highwater-restore -p highwater-tests --bins
  bin_dir="$(cd "${CARGO_TARGET_DIR:-target}/release" && pwd)"
}

# The distribution's PostgreSQL: 15, or else its newest; PG_BIN names another.
find_postgres() {
  if [ -n "${PG_BIN:-}" ]; then
    pg_bin="$PG_BIN"
  elif [ -x /usr/lib/postgresql/15/bin/postgres ] && [ -x /usr/lib/postgresql/15/bin/pgbench ]; then
    pg_bin=/usr/lib/postgresql/15/bin
  else
    pg_bin="$(compgen -G '/usr/lib/postgresql/*/bin/pgbench' | sort -V | tail -n 1 | xargs -r dirname)"
  fi
  [ -x "${pg_bin:-.}/postgres" ] || die "no PostgreSQL found in /usr/lib/postgresql; name its programs with PG_BIN"
  pg_version="$("$pg_bin/postgres" --version | awk '{ print $3 }')"
}

# PostgreSQL refuses to run as root: as root, everything runs as this user. Sets run_as, a command prefix.
choose_user() {
  user="$(id -un)"
  run_as=(env)
  if [ "$(id -u)" -eq 0 ]; then
    user=postgres
    id postgres >/dev/null 2>&1 || user=nobody
    run_as=(setpriv "--reuid=$(id -u "$user")" "--regid=$(id -g "$user")" --clear-groups env)
  fi
}

# A temporary directory for everything, with copies of the programs: the user may not see the repository.
make_work_directory() { # name, programs...
  local name="$1" program
  shift
  work="$(mktemp -d "${TMPDIR:-/tmp}/$name.XXXXXX")"
  mkdir "$work/bin" "$work/log" "$work/socket"
  for program in "$@"; do
    [ -x "$bin_dir/$program" ] || die "$bin_dir/$program is missing"
    cp "$bin_dir/$program" "$work/bin/"
  done
  chmod 0755 "$work" "$work/bin"
  [ "$(id -u)" -ne 0 ] || chown -R "$user:" "$work"
}

# A port that nobody listens on.
free_port() {
  local port
  for _ in {1..50}; do
    port=$((20000 + RANDOM % 12000))
    if ! (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then
      printf '%s\n' "$port"
      return
    fi
  done
  die "no free port found"
}

# The body of an answer from 127.0.0.1, without a client installed; fails unless the answer is 200.
http_get() { # port, path
  (
    exec 3<>"/dev/tcp/127.0.0.1/$1" || exit 1
    printf 'GET %s HTTP/1.0\r\nHost: localhost\r\n\r\n' "$2" >&3
    awk 'NR == 1 { ok = ($2 == 200) } body { print } /^\r?$/ { body = 1 } END { exit !ok }' <&3
  ) 2>/dev/null
}

wait_until() { # seconds, what, command...
  local limit="$1" what="$2" end
  shift 2
  end=$((SECONDS + limit))
  until "$@"; do
    [ "$SECONDS" -lt "$end" ] || die "waited $limit s in vain until $what"
    sleep 0.1
  done
}

# Milliseconds of the machine's clock.
now_ms() { printf '%s\n' $((${EPOCHREALTIME/[^0-9]/} / 1000)); }

# A process that only its parent has not noticed yet is gone.
alive() { kill -0 "$1" 2>/dev/null && ! grep -qs '^State:.*Z' "/proc/$1/status"; }

# Ends processes by their ids and waits until they are gone.
end_process() { # signal, pid...
  local signal="$1" pid
  shift
  for pid in "$@"; do
    kill -s "$signal" "$pid" 2>/dev/null || true
  done
  for pid in "$@"; do
    for _ in {1..100}; do
      alive "$pid" || break
      sleep 0.05
    done
    kill -s KILL "$pid" 2>/dev/null || true
  done
}
