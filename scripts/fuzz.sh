#!/usr/bin/env bash
# Runs every fuzz test of the repository for the given time each: fuzz.sh 30s
set -euo pipefail
cd "$(dirname -- "${BASH_SOURCE[0]}")/.."
time=${1:-30s}
grep -rHoE --include='*_test.go' '^func Fuzz[A-Za-z0-9_]+' . | sort | while IFS=: read -r file func; do
	name=${func#func } dir=$(dirname -- "$file")
	echo "== $name in $dir, $time"
	(cd "$dir" && go test -run '^$' -fuzz "^$name\$" -fuzztime "$time" .)
done
