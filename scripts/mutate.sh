#!/usr/bin/env bash
# Takes one safety rule after the other out of a copy of the agent, and makes sure that the simulation notices.
# The rules are the patches in tests/mutations; a patch that does not fit any more is a failure too.
# Takes a few minutes. Arguments are names of patches; without any, all are tried.
# HIGHWATER_SCHEDULES (default 200 here) bounds how long each mutant may go unnoticed, HIGHWATER_SEED says where to begin.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."

target="${CARGO_TARGET_DIR:-$PWD/target}"
patches="$PWD/tests/mutations"
copy="$target/mutations"
export HIGHWATER_SCHEDULES="${HIGHWATER_SCHEDULES:-200}"
export CARGO_TARGET_DIR="$target"
export RUST_BACKTRACE=0

if [ "$#" -eq 0 ]; then
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

unnoticed=""
for name in "$@"; do
  patch --quiet --forward -d "$copy" -p1 <"$patches/$name.patch" || {
    printf 'mutate: %s does not fit the code any more: write it anew\n' "$name" >&2
    exit 2
  }
  log="$target/mutations-$name.log"
  built=yes
  (cd "$copy" && cargo test --quiet --offline --workspace --test simulation --no-run) >"$log" 2>&1 || built=no
  noticed=no
  if [ "$built" = yes ] && ! (cd "$copy" && cargo test --quiet --offline --workspace --test simulation) >>"$log" 2>&1; then
    noticed=yes
  fi
  patch --quiet --reverse -d "$copy" -p1 <"$patches/$name.patch"
  if [ "$built" = no ]; then
    printf 'mutate: %s does not compile, see %s\n' "$name" "$log" >&2
    exit 2
  fi
  if [ "$noticed" = yes ]; then
    printf 'noticed    %-26s %s\n' "$name" "$(grep -m1 -oE 'HIGHWATER_SEED=.*|assertion .* failed' "$log" | cut -c1-140)"
  else
    printf 'UNNOTICED  %s, see %s\n' "$name" "$log"
    unnoticed="$unnoticed $name"
  fi
done

if [ -n "$unnoticed" ]; then
  printf 'mutate: the simulation does not miss:%s\n' "$unnoticed" >&2
  exit 1
fi
