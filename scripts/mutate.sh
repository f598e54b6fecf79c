#!/usr/bin/env bash
# Takes one safety rule after the other out of a copy of the agent, and makes sure that the simulation notices.
# The rules are the patches in tests/mutations; a patch that does not fit any more is a failure too. Where another test than
# the simulation is the right place, the patch names it: "Noticed by: " and what `cargo test --workspace` is to be told.
# Takes a quarter of an hour. Arguments are names of patches; without any, all are tried, after the untouched code.
# HIGHWATER_SCHEDULES (default 200 here) bounds how long each mutant may go unnoticed, HIGHWATER_SEED says where to begin.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."

target="${CARGO_TARGET_DIR:-$PWD/target}"
patches="$PWD/tests/mutations"
copy="$target/mutations"
export HIGHWATER_SCHEDULES="${HIGHWATER_SCHEDULES:-200}"
export CARGO_TARGET_DIR="$target"
export RUST_BACKTRACE=0

all=no
if [ "$#" -eq 0 ]; then
  all=yes
  for file in "$patches"/*.patch; do set -- "$@" "$(basename "$file" .patch)"; done
fi

# Files that did not change keep their times, so that only what a patch touches is compiled again.
mkdir -p "$copy"
git ls-files --cached --others --exclude-standard -z | while IFS= read -r -d '' file; do
  [ -f "$file" ] || continue
  if ! cmp -s "$file" "$copy/$file"; then
    mkdir -p "$copy/$(dirname "$file")"
    cp "$file" "$copy/$file"
  fi
done

# Another version makes these other packages: they share the dependencies that are compiled already, and nothing else.
sed -i 's/^version = "\(.*\)"/version = "\1-mutant"/' "$copy/Cargo.toml"

# Runs one test of the copy, which are words for `cargo test`. 0: it passed, 1: it failed or did not end, 2: it does not compile.
try() {
  local log="$1"
  shift
  (cd "$copy" && cargo test --quiet --offline --workspace "$@" --no-run) >"$log" 2>&1 || return 2
  (cd "$copy" && timeout 900 cargo test --quiet --offline --workspace "$@") >>"$log" 2>&1 || return 1
}

# What fails without any change proves nothing.
if [ "$all" = yes ] && ! try "$target/mutations-none.log" --test simulation; then
  printf 'mutate: the simulation fails as it is, see %s\n' "$target/mutations-none.log" >&2
  exit 2
fi

unnoticed=""
for name in "$@"; do
  file="$patches/$name.patch"
  patch --quiet --forward -d "$copy" -p1 <"$file" || {
    printf 'mutate: %s does not fit the code any more: write it anew\n' "$name" >&2
    exit 2
  }
  log="$target/mutations-$name.log"
  words="$(sed -n '1s/^Noticed by: //p' "$file")"
  result=0
  # shellcheck disable=SC2086 # words, not a word
  try "$log" ${words:---test simulation} || result=$?
  patch --quiet --reverse -d "$copy" -p1 <"$file"
  case "$result" in
    0)
      printf 'UNNOTICED  %s, see %s\n' "$name" "$log"
      unnoticed="$unnoticed $name"
      ;;
    1) printf 'noticed    %-34s %s\n' "$name" "$(grep -m1 -oE 'HIGHWATER_SEED=.*|assertion .* failed|test .* FAILED' "$log" | cut -c1-140)" ;;
    *)
      printf 'mutate: %s does not compile, see %s\n' "$name" "$log" >&2
      exit 2
      ;;
  esac
done

if [ -n "$unnoticed" ]; then
  printf 'mutate: no test misses:%s\n' "$unnoticed" >&2
  exit 1
fi
