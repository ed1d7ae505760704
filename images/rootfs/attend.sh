#!/bin/busybox sh
# shellcheck shell=dash
# Attends to what is plugged in: loads its driver, takes the configuration from a drive, and brings network interfaces up. With
# "once", for the beginning, it ends when that is done.
# shellcheck source=/dev/null # written by the builder, from appliance.json
export PATH=/usr/bin:/bin
. /usr/lib/sidegate/appliance
. /usr/lib/sidegate/drive.sh

plugged() { ls /sys/bus/*/devices; } 2>/dev/null

# drivers loads those of devices, and of the devices that then appear behind them.
drivers() {
	local tried=/run/tried new=/run/untried
	[ -e $tried ] || echo none >$tried # busybox's grep takes an empty file for a pattern that everything has
	while find /sys/devices -name modalias -exec cat {} + | sort -u | grep -vxF -f $tried >$new; do
		cat $new >>$tried
		xargs modprobe -q -a <$new
	done
} 2>/dev/null

# sticks_come is true while something in a USB port is a drive of which nothing is to be seen yet.
sticks_come() {
	local interface
	# shellcheck disable=SC2013 # they have no blanks
	for interface in $(grep -lx 08 /sys/bus/usb/devices/*/bInterfaceClass); do
		find "${interface%/*}/" -type d -name block | grep -q . || return 0
	done
	return 1
} 2>/dev/null

# drives are the numbers of all that were ever plugged in and still are: one that is pulled out and plugged in again has another.
drives() { cat /sys/block/*/diskseq; } 2>/dev/null

# drive takes the configuration from the first that has one of the labels, once for each time that it is plugged in.
drive() {
	local device label disk
	for label in "$@"; do
		device=$(findfs LABEL="$label" 2>/dev/null) || continue
		disk=/sys/class/block/${device##*/}
		disk=$device.$(cat "$disk/diskseq" "$disk/../diskseq" 2>/dev/null) # a partition's is its disk's
		[ "$disk" = "$taken" ] && return 1
		taken=$disk
		echo "$taken" >/run/taken
		take "$device" "$label"
		return
	done
	taken=
	return 1
}

# fixed gives the interface $1 what the file "network" says.
fixed() {
	local value
	for value in $(setting address); do
		ip address add "$value" dev "$1" || say "network: the address $value is not taken; it is written as 192.168.0.2/24"
	done
	for value in $(setting gateway); do
		case $value in
		*:*) ip -6 route replace default via "$value" dev "$1" ;;
		*) ip route replace default via "$value" dev "$1" ;;
		esac || say "network: the gateway $value is not taken"
	done
	for value in $(setting dns); do echo "nameserver $value"; done >/etc/resolv.conf
}

# interfaces brings up those that are new. One is the file's, where it names an address: the one that it names, else the first.
interfaces() {
	local path name wanted
	wanted=$(setting interface)
	for path in /sys/class/net/*; do
		name=${path##*/}
		if [ ! -e "$path/device" ] || [ "$(cat "$path/type")" != 1 ] || [ -e "/run/up/$name" ]; then continue; fi
		if [ "${wanted:-$name}" != "$name" ]; then continue; fi
		mkdir -p /run/up
		: >"/run/up/$name"
		ip link set "$name" up
		if [ -z "$(setting address)" ]; then
			udhcpc -b -S -t 3 -T 1 -A 3 -i "$name" -x hostname:"$HOST" -s /usr/lib/sidegate/dhcp.sh -p "/run/up/$name" >/dev/null 2>&1 &
		else
			fixed "$name"
			wanted=$name
		fi
	done
}

taken=$(cat /run/taken 2>/dev/null)
if [ "$1" = once ]; then
	drivers
	# What is in a USB port says so late, and its rules are to hold from the first packet on.
	if ls /sys/bus/usb/devices/usb* >/dev/null 2>&1; then
		for _ in 1 2 3 4 5 6; do
			sleep 0.5
			drivers
			sticks_come || break
		done
	fi
	drive "$CONFIGURATION_LABEL" "$BOOT_LABEL"
	interfaces
	exit
fi
export CONFIGURATION_IN_FORCE=yes
while sleep 2; do
	[ "$seen" != "$(plugged)$(drives)$(cat /proc/partitions)" ] || continue
	drivers
	if drive "$CONFIGURATION_LABEL"; then
		sidegate reload >/dev/kmsg 2>&1
	fi
	interfaces
	seen=$(plugged)$(drives)$(cat /proc/partitions)
done
