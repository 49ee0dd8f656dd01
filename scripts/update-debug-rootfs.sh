#!/usr/bin/env bash
# Puts a fresh guest agent (builds/envd) into an image and updates the manifest beside it:
#   make build-envd && bash scripts/update-debug-rootfs.sh /var/lib/wrenn/images/minimal.ext4
set -euo pipefail
image=${1:?usage: $0 IMAGE.ext4}
image=$(realpath -- "$image")
cd "$(dirname -- "${BASH_SOURCE[0]}")/.."
exec go run ./images/build inject "$image"
