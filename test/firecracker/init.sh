#!/bin/bash
# The first process of the emulated machine: it has KVM by SVM, runs the suites and switches the machine off.
# Its serial ports: the console, with a sign of life every few seconds, and what the tests print. There are two, for a third
# shares its interrupt with the first and stops now and then.
mount -t proc proc /proc
mountpoint -q /sys || mount -t sysfs sys /sys
mount -t devtmpfs dev /dev 2>/dev/null
mkdir -p /dev/pts /dev/shm
mount -t devpts pts /dev/pts
mount -t tmpfs shm /dev/shm
mount -t tmpfs run /run
mount -t cgroup2 cgroup /sys/fs/cgroup
mount -o remount,rw /
(while echo alive; do sleep 3; done) &
modprobe -a kvm-amd tun loop veth nf_tables xfs
ip link set lo up
hostname emulated
stty -F /dev/ttyS1 raw -echo
export HOME=/root PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin TMPDIR=/var/tmp
mkdir -p /payload && mount -o ro /dev/vdb /payload
. /payload/environment
bash /payload/suites.sh /payload /dev/ttyS1
echo '=== done' >/dev/ttyS1
kill -9 -1
sync
mount -o remount,ro /
echo o >/proc/sysrq-trigger
exec sleep 60
