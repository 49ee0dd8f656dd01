#!/usr/bin/env bash
# `make up`: from a clone to the first output of a sandbox. Every step shows its elapsed time; what is
# done already takes no time. The parts can be run by hand: make build images, builds/wrenn up.
set -euo pipefail
cd "$(dirname -- "${BASH_SOURCE[0]}")/.."
SECONDS=0

# quietly NAME COMMAND…: runs a command that says nothing, with a sign of life.
quietly() {
	local name=$1 began=$SECONDS log pid status=0
	shift
	log=$(mktemp)
	"$@" >"$log" 2>&1 &
	pid=$!
	while kill -0 $pid 2>/dev/null; do
		if [ -t 2 ]; then
			printf '\r\033[K  … %s  %ds' "$name" $((SECONDS - began)) >&2
		elif [ $(((SECONDS - began) % 10)) = 9 ]; then
			printf '  … %s, for %ds\n' "$name" $((SECONDS - began)) >&2
		fi
		sleep 1
	done
	wait $pid || status=$?
	[ -t 2 ] && printf '\r\033[K' >&2
	if [ $status != 0 ]; then
		cat "$log" >&2
		printf '  ✗ %s failed after %ds\n' "$name" $((SECONDS - began)) >&2
	else
		printf '  ✓ %-22s %5ds\n' "$name" $((SECONDS - began)) >&2
	fi
	rm -f "$log"
	return $status
}

command -v go >/dev/null || { echo "Go is missing: install Go 1.26 or newer from https://go.dev/dl and put it into PATH" >&2; exit 1; }
bash scripts/install.sh run
quietly "build the programs" make --no-print-directory build
make --no-print-directory images
builds/wrenn up

echo
echo "The first sandbox:"
wrenn=builds/wrenn
export WRENN_API_URL WRENN_API_KEY
# shellcheck source=/dev/null
. "${WRENN_HOME:-.wrenn}/env"
id=$($wrenn sandbox create base)
echo "  $id"
$wrenn sandbox exec "$id" -- python3 -c '
import os, platform, time
print("  Python", platform.python_version(), "on Linux", platform.release(), "as", os.environ.get("USER", "user"))
print("  6 × 7 =", 6 * 7)'
printf '
It is yours; %ds in all. Go on with

  . %s
  %s sandbox shell %s
  curl -H "X-API-Key: $WRENN_API_KEY" %s/v1/sandboxes
  %s sandbox rm %s

API reference: %s/docs · stop: make down · remove everything: make reset
' "$SECONDS" "${WRENN_HOME:-.wrenn}/env" "$wrenn" "$id" "$WRENN_API_URL" "$wrenn" "$id" "$WRENN_API_URL"
