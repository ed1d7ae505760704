#!/bin/busybox sh
# shellcheck shell=dash
# Shows on a console the address, the gateway's state and how to configure it; Enter opens a shell.
# shellcheck source=/dev/null # written by the builder, from appliance.json
export PATH=/usr/bin:/bin HOME=/root TERM=linux
. /usr/lib/sidegate/appliance

addresses() { ip -o address show scope global | awk '{ print "  " $4 " on " $2 }'; }

# What, when it is another, is worth being shown again; it costs little.
state() {
	addresses
	ls -l /run/configured-by /run/refused "$CONFIGURATION"
	dmesg | grep -c ' running: '
	dmesg | sed -n 's/.*appliance: //p' | sort -u # what is tried again and again fails in the same way
} 2>/dev/null

# served is how long after its hand-over to /init the kernel was told that the gateway is running, in seconds.
served() {
	dmesg | awk -F '[][ ]+' '/Run \/init as init process/ { from = $2 } / running: / && from { printf "%.1f\n", $2 - from; exit }'
}

show() {
	echo
	echo "Address:"
	addresses | grep . || echo "  none yet: no DHCP server has answered"
	echo
	if served | grep -q . && "$PROGRAM" status 2>/dev/null; then
		:
	elif dmesg | grep -q 'appliance: sidegate has ended'; then
		echo "The gateway is not running:"
		dmesg | tail -n 4
	else
		echo "The gateway is being started."
	fi
	[ -z "$(served)" ] || echo "Serving since $(served) s after the kernel's hand-over."
	echo
	echo "Configured by $(cat /run/configured-by 2>/dev/null || echo 'nobody yet: everything goes direct')."
	cat /run/refused 2>/dev/null
	cat <<-END
		Put the files sidegate.yaml and network (address = 192.168.0.2/24, gateway = 192.168.0.1) onto a drive labelled
		$CONFIGURATION_LABEL, or onto the partition $BOOT_LABEL of the one that this box starts from. Then make the address above
		the gateway of a client, or of all of them in the main router's DHCP server.
		Enter: a shell (sidegate status, flows, doctor; dmesg is the log)
	END
}

while :; do
	if [ "$shown" != "$(state)" ]; then
		[ "$(tty)" = /dev/tty1 ] && printf '\033[H\033[2J'
		show
		shown=$(state)
	fi
	# shellcheck disable=SC3045 # busybox has it
	if read -r -t 3 _; then
		cd /
		echo "sidegate.yaml is in $CONFIGURATION until the next start; sidegate reload takes it. exit closes the shell."
		exec sh
	fi
done
