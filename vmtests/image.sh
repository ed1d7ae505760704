#!/usr/bin/env bash
# Builds the image with each kernel (as scripts/kernel.sh has it) and plays the scenarios with it, in a virtual machine in the place of the
# lab's side router. Root. One machine runs at a time.
#
#   vmtests/image.sh linux-image-6.12-cloud-amd64 trixie-backports/linux-image-cloud-amd64
set -euo pipefail
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
results=() failed=no
for kernel; do
	begun=$SECONDS
	if ! scripts/kernel.sh "$kernel" >/dev/null; then
		results+=("SKIP  $kernel: it cannot be fetched (above)")
		continue
	fi
	images/build.sh "$kernel" "$work/image"
	result=ok
	SIDEGATE_IMAGE=$work/image/sidegate.img.gz SIDEGATE_OCI=$work/image/oci \
		go run ./scripts/testreport -count=1 -timeout=20m -run='^(TestImage.*|TestContainer.*)$' ./appliance/endtoend || result=FAIL failed=yes
	results+=("$result  $kernel ($((SECONDS - begun)) s)")
done
printf '%s\n' 'vmtests/image.sh:' "${results[@]}"
[[ $failed == no ]]
