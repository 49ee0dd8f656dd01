#!/bin/bash
# The first process of the emulated machine: it has KVM by SVM, runs the suites and switches the machine off.
mount -t proc proc /proc
mountpoint -q /sys || mount -t sysfs sys /sys
mount -t devtmpfs dev /dev 2>/dev/null
mkdir -p /dev/pts /dev/shm
mount -t devpts pts /dev/pts
mount -t tmpfs shm /dev/shm
mount -t tmpfs run /run
mount -t cgroup2 cgroup /sys/fs/cgroup
mount -o remount,rw /
modprobe -a kvm-amd tun loop veth nf_tables xfs
ip link set lo up
hostname emulated
export HOME=/root PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin TMPDIR=/var/tmp
mkdir -p /payload && mount /dev/vdb /payload
mkdir -p /payload/results
. /payload/environment
bash /payload/suites.sh /payload /payload/results
echo done >/payload/results/done
kill -9 -1
sleep 1
umount /payload || { sync; mount -o remount,ro /payload; }
sync
echo o >/proc/sysrq-trigger
exec sleep 60
