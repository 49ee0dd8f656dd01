#!/usr/bin/env bash
# Makes kernel, initramfs and images twice from nothing and compares every byte.
#   images/check-reproducible.sh [image …]      (default: minimal)
set -euo pipefail
cd "$(dirname -- "${BASH_SOURCE[0]}")/.."
[ $# -gt 0 ] || set -- minimal
[ -x builds/envd ] || make build-envd
tmp=$(mktemp -d "${TMPDIR:-/var/tmp}/wrenn-images.XXXXXX")
trap 'rm -rf -- "$tmp"' EXIT
cp builds/envd "$tmp/envd" # both builds get the same one, whatever is built meanwhile
sums() { # digests of everything in one build; the manifest is compared without what depends on this disk
	(cd "$tmp/$1" && sha256sum kernels/vmlinuz kernels/initramfs.img images/*.ext4 &&
		grep -v used_bytes -h images/*.json | sha256sum)
}
for run in a b; do
	go run ./images/build -envd "$tmp/envd" -images "$tmp/$run/images" -kernels "$tmp/$run/kernels" "$@"
	sums "$run" >"$tmp/$run.sums"
	[ "$run" = b ] || rm -f "$tmp"/a/images/*.ext4
done
diff "$tmp/a.sums" "$tmp/b.sums"
echo "reproducible: $*"
cat "$tmp/a.sums"
