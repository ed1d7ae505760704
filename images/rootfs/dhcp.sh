#!/bin/busybox sh
# shellcheck shell=dash
# What udhcpc calls with what it was told.
# shellcheck disable=SC2154 # its variables
export PATH=/usr/bin:/bin
case $1 in
bound | renew)
	ip -4 address show dev "$interface" | grep -q " $ip/$mask " || ip -4 address flush dev "$interface"
	ip address replace "$ip/$mask" dev "$interface" valid_lft "$lease" preferred_lft "$lease" 2>/dev/null || ip address replace "$ip/$mask" dev "$interface"
	metric=$(cat "/sys/class/net/$interface/ifindex") # of two ways out the first interface's is the one, whichever server is faster
	for via in $router; do # a LAN whose DHCP server names the box as everybody's gateway names it to the box, too
		if [ "$via" = "$ip" ]; then
			echo "<4>appliance: DHCP names the box as its own gateway: have the server except it, or give it an address of its own by the file network" >/dev/kmsg
			continue
		fi
		ip route replace default via "$via" dev "$interface" metric "$metric"
		break
	done
	mkdir -p /run/dns
	for server in $dns; do echo "nameserver $server"; done >"/run/dns/$metric"
	cat /run/dns/* >/etc/resolv.conf
	echo "<6>appliance: $interface has $ip/$mask from the DHCP server $serverid" >/dev/kmsg
	;;
deconfig)
	ip -4 address flush dev "$interface"
	;;
esac
