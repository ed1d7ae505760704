#!/bin/busybox sh
# shellcheck shell=dash
# What is done once, before anything else.
# shellcheck source=/dev/null # written by the builder, from appliance.json
export PATH=/usr/bin:/bin
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
mkdir -p /dev/pts
mount -t devpts pts /dev/pts
mount -t tmpfs -o mode=755 run /run
mount -t cgroup2 cgroup /sys/fs/cgroup
mount -t bpf -o mode=700 bpf /sys/fs/bpf
. /usr/lib/sidegate/appliance
hostname "$HOST"
echo /bin/modprobe >/proc/sys/kernel/modprobe # what the kernel starts when it is asked for something that is a module
ip link set lo up
# A router takes no advertisements with 1, and the box may need its own IPv6 route from them: the same as in sidegate's list.
echo 2 >/proc/sys/net/ipv6/conf/default/accept_ra
exec /usr/lib/sidegate/attend.sh once
