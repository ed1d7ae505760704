#!/bin/busybox sh
# shellcheck shell=dash
# Runs the gateway; init starts it again when it ends. Its log is the kernel's (dmesg): bounded, with times since the start, and still
# there after a crash.
# shellcheck source=/dev/null # written by the builder, from appliance.json
export PATH=/usr/bin:/bin
. /usr/lib/sidegate/appliance
mkdir -p "$DATA"
"$PROGRAM" run --apply-sysctls -c "$CONFIGURATION/sidegate.yaml" --data-dir "$DATA" >/dev/kmsg 2>&1
echo "<4>appliance: sidegate has ended with $?" >/dev/kmsg
sleep 1
