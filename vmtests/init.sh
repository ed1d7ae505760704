#!/bin/busybox sh
# shellcheck shell=dash
# The first process of the virtual machine: runs the test binary and tells how it ended.
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/tmp TMPDIR=/tmp
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
mount -t tmpfs run /run
mount -t tmpfs tmp /tmp
mount -t cgroup2 cgroup /sys/fs/cgroup
mount -t bpf bpf /sys/fs/bpf
ln -s /proc/self/fd /dev/fd && ln -s fd/0 /dev/stdin
ip link set lo up
echo /bin/modprobe >/proc/sys/kernel/modprobe # what the kernel starts when it is asked for something that is a module
modprobe tun                                  # who wants this one opens its device, which is not there before

# The kernel speaks on the first serial port, the test on the second.
stty -F /dev/ttyS1 raw # lines end as they were written
xargs -0 env </arguments >/dev/ttyS1 2>&1
echo "the test ended with $?" >/dev/ttyS0
poweroff -f
