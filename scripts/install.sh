#!/usr/bin/env bash
# Makes sure of the programs that Wrenn needs on this machine: `install.sh run` for `make up`,
# `install.sh test` for `make test` too. On Debian and Ubuntu it installs what is missing; elsewhere it
# lists that and stops. What is there already costs nothing.
set -euo pipefail
PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin

missing=() packages=()
# need COMMAND PACKAGE: the package, if nothing of that name can be run.
need() {
	if ! command -v "$1" >/dev/null && ! compgen -G "/usr/lib/postgresql/*/bin/$1" >/dev/null; then
		missing+=("$1") packages+=("$2")
	fi
}

need initdb postgresql
need redis-server redis-server
if [ "$(uname -m)" = aarch64 ]; then need qemu-system-aarch64 qemu-system-arm; else need qemu-system-x86_64 qemu-system-x86; fi
need mmdebstrap mmdebstrap
need mke2fs e2fsprogs
need mkfs.xfs xfsprogs
need nft nftables
need ip iproute2
need losetup mount
need setpriv util-linux
need cpio cpio
need xz xz-utils
need zstd zstd
if [ "$(id -u)" != 0 ]; then need newuidmap uidmap; fi
if [ "${1:-run}" = test ]; then need git git; fi
if [ ! -s /usr/share/keyrings/debian-archive-keyring.gpg ]; then missing+=(debian-archive-keyring) packages+=(debian-archive-keyring); fi
if [ ! -s /etc/ssl/certs/ca-certificates.crt ]; then missing+=(ca-certificates) packages+=(ca-certificates); fi

[ ${#missing[@]} = 0 ] && exit 0

if ! command -v apt-get >/dev/null; then
	echo "Missing on this machine: ${missing[*]}" >&2
	echo "Install them with your package manager (on Debian the packages are: ${packages[*]}), then run this again." >&2
	exit 1
fi
sudo=
if [ "$(id -u)" != 0 ]; then
	command -v sudo >/dev/null || { echo "Missing: ${missing[*]}. Run as root: apt-get install ${packages[*]}" >&2; exit 1; }
	sudo=sudo
fi
echo "Installing ${packages[*]}"
# Wrenn runs PostgreSQL and Redis of its own: those of the packages are not to start.
policy=/usr/sbin/policy-rc.d
if [ ! -e $policy ]; then
	printf '#!/bin/sh\nexit 101\n' | $sudo tee $policy >/dev/null
	$sudo chmod 755 $policy
	trap '$sudo rm -f $policy' EXIT
fi
$sudo apt-get update -q
$sudo env DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends "${packages[@]}"
if [ -d /run/systemd/system ]; then
	for p in "${packages[@]}"; do
		case $p in postgresql | redis-server) $sudo systemctl disable --quiet "$p" || true ;; esac
	done
fi
