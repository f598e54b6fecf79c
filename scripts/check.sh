#!/usr/bin/env bash
# Everything that can be said about the code without running it: format, lints, the rules of the
# house about dependencies, file sizes, shell syntax, mutants that still fit. Prints every violation, then fails once.
set -uo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
failures=0

title() { printf '\n== %s\n' "$*"; }
fail() {
  printf 'check: %s\n' "$*" >&2
  failures=$((failures + 1))
}

# Names of all crates that the named workspace crate links, itself left out. Development
# dependencies are left out too: they do not reach a user.
links() { cargo tree --locked --quiet -p "$1" -e normal,build --prefix none --format '{p}' | awk '{print $1}' | sort -u | grep -vx "$1"; }
# Names of what the crate names itself, of whatever kind.
names() { cargo tree --locked --quiet -p "$1" -e "${2:-normal,build,dev}" --depth 1 --prefix none --format '{p}' | awk '{print $1}' | sort -u | grep -vx "$1"; }

forbid() { # crate, extended regular expression, reason
  local hit
  hit="$(links "$1" | grep -E "^($2)\$" | tr '\n' ' ')"
  [ -z "$hit" ] || fail "$1 links ${hit% }: $3"
}

check_format() {
  title "format"
  cargo fmt --all --check || fail "the code is not formatted: run cargo fmt --all"
}

check_lints() {
  title "lints"
  cargo clippy --locked --workspace --all-targets -- -D warnings || fail "clippy has objections"
}

check_dependencies() {
  title "dependencies"
  forbid highwater-agent 'highwater-restore' "a restore must be trusted when the agent is broken"
  forbid highwater-restore 'highwater-agent' "a restore must be trusted when the agent is broken"
  forbid highwater-restore 'highwater-pgwire' "a restore needs no live primary"
  forbid highwater-format 'tokio.*|async-.*|aws-.*|hyper.*|highwater-.*' "the archive format is pure"
  forbid highwater-store 'highwater-.*' "a store knows nothing of what it holds"
  forbid highwater-pgwire 'aws-(config|sdk|smithy|runtime|credential).*|highwater-(store|config|agent|restore)' "the replication client knows no storage"
  local package
  for package in highwater-agent highwater-restore highwater-pgwire highwater-config highwater-tests; do
    if names "$package" | grep -qE '^aws-(config|sdk|smithy)'; then
      fail "$package names an AWS crate: only highwater-store may"
    fi
    if names "$package" normal | grep -qxE 'highwater-tests'; then
      fail "$package needs the test harness outside of tests"
    fi
  done
  check_banned
}

# What is linked, not what the lock file lists: it also names the optional parts that nobody asked for.
check_banned() {
  local all banned="" rule versions
  all="$(cargo tree --locked --quiet --workspace -e normal,build,dev --prefix none --format '{p}' | awk '{print $1, $2}' | sort -u)"
  for rule in \
    'ring:one TLS provider, aws-lc-rs' 'openssl:rustls is used' 'openssl-sys:rustls is used' \
    'native-tls:rustls is used' 'bincode:unmaintained; stored bytes are specified by hand' \
    'backoff:unmaintained; use backon' 'tokio-tar:open advisory; use tar' 'async-std:discontinued'; do
    if grep -q "^${rule%%:*} " <<<"$all"; then
      banned="$banned ${rule%%:*} (${rule#*:})"
    fi
  done
  [ -z "$banned" ] || fail "banned crates are linked:$banned"
  versions="$(grep -c '^rustls ' <<<"$all")"
  [ "$versions" -le 1 ] || fail "$versions versions of rustls are linked"
}

# Lines before the tests of a file, which stand at its end.
code_lines() { awk '/^#\[cfg\(test\)\]/ { exit } { lines++ } END { print lines + 0 }' "$1"; }

check_files() {
  title "files"
  local file lines
  while read -r file; do
    case "$file" in */tests/* | *_tests.rs | */testdata/*) continue ;; esac
    lines="$(code_lines "$file")"
    [ "$lines" -le 600 ] || fail "$file has $lines lines: divide it"
  done < <(git ls-files --cached --others --exclude-standard '*.rs')
  # An exception from a lint says why; formatted code may put the reason on a later line.
  while read -r file; do
    awk -v file="$file" '
      /#!?\[(allow|expect)\(/ { open = 1; text = ""; line = FNR }
      open { text = text $0; if ($0 ~ /\)\]/) { open = 0; if (text !~ /reason *=/) { print file ":" line; bad = 1 } } }
      END { exit bad }' "$file" || fail "an exception from a lint without its reason in $file"
  done < <(git ls-files --cached --others --exclude-standard '*.rs')
}

check_shell() {
  title "scripts"
  local file
  while read -r file; do
    bash -n "$file" || fail "$file is not valid shell"
    [ -x "$file" ] || fail "$file is not executable"
  done < <(git ls-files --cached --others --exclude-standard 'scripts/*.sh' 'deploy/**/*.sh' '.ci/run')
  if command -v shellcheck >/dev/null 2>&1; then
    git ls-files --cached --others --exclude-standard 'scripts/*.sh' '.ci/run' | xargs shellcheck -S warning || fail "shellcheck has objections"
  fi
}

# A mutant that cannot be made is not noticed either.
check_mutations() {
  title "mutations"
  local file
  for file in tests/mutations/*.patch; do
    git apply --check "$file" || fail "$file does not fit the code any more: write it anew"
  done
}

check_format
check_files
check_shell
check_mutations
check_dependencies
check_lints

if [ "$failures" -gt 0 ]; then
  printf '\ncheck: %d failures\n' "$failures" >&2
  exit 1
fi
printf '\ncheck: everything is in order\n'
