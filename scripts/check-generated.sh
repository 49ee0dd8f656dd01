#!/usr/bin/env bash
# Regenerates all generated code and fails if anything was out of date. It compares with what was
# there before, so it works on uncommitted changes too, and leaves the fresh files in place.
set -euo pipefail
cd "$(dirname -- "${BASH_SOURCE[0]}")/.."
sums() { grep -rlE --include='*.go' '^// Code generated .* DO NOT EDIT' internal sdk | sort | xargs sha256sum; }
before=$(sums)
make --no-print-directory generate
if ! changed=$(diff <(echo "$before") <(sums) | sed -n 's/^[<>] [0-9a-f]*  //p' | sort -u) || [ -n "$changed" ]; then
	echo "Generated code was out of date; it has been regenerated, commit it:" >&2
	echo "$changed" >&2
	exit 1
fi
