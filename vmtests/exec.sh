#!/usr/bin/env bash
# Runs a test binary in a virtual machine with another kernel, for go test:
#
#   CGO_ENABLED=0 go test -exec "$PWD/vmtests/exec.sh KERNEL" -run TestPlaces ./appliance/endtoend
#
# KERNEL is a package of this Debian, such as linux-image-6.12-cloud-amd64. It is downloaded and unpacked, never
# installed. The processor is emulated (QEMU's tcg): slow, and needs nothing of the machine. The virtual machine has
# no disk and no network; its memory begins with what the tests need: this tree, a few programs, the kernel's modules.
set -euo pipefail
PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin
here=$PWD
cd "$(dirname "$0")/.."
[[ $# -ge 2 ]] || {
	sed -n '2,/^set/s/^# \{0,1\}//p' "$0" >&2
	exit 2
}
kernel=$1 binary=$2
shift 2

# What tests start apart from sidegate, and the modules that this may make the kernel load.
programs='sh ip nft danted wg radvd setpriv mount'
modules='kernel/net kernel/crypto kernel/lib kernel/arch kernel/drivers/net'

die() {
	printf 'vmtests: %s\n' "$*" >&2
	exit 1
}
for program in busybox cpio depmod qemu-system-x86_64 $programs; do
	command -v "$program" >/dev/null || die "$program is missing: scripts/install-deps.sh test vm"
done
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# fill puts what the virtual machine begins with into directory $1; the other arguments are the test binary's.
fill() {
	local root=$1 program path release
	shift
	release=$(ls "$tree/lib/modules")
	mkdir -p "$root"/{proc,sys,dev,run,tmp,etc,bin,src}
	cp vmtests/init.sh "$root/init"
	cp "$(command -v busybox)" "$root/bin/busybox"
	for program in $programs; do
		path=$(command -v "$program")
		cp -L --parents "$path" "$root"
		ldd "$path" | awk '$(NF-1) ~ /^\// { print $(NF-1) }' | xargs -r cp -L --parents -t "$root"
	done
	printf 'root:x:0:0::/:/bin/sh\nnobody:x:65534:65534::/:/bin/false\n' >"$root/etc/passwd"
	printf 'root:x:0:\nnogroup:x:65534:\n' >"$root/etc/group"
	# shellcheck disable=SC2086 # words
	(cd "$tree" && cp -r --parents "lib/modules/$release"/modules.* ${modules//kernel\//lib/modules/$release/kernel/} "$root")
	CGO_ENABLED=0 go build -ldflags '-s -w' -o "$root/sidegate" ./appliance/sidegate
	git ls-files -z --cached --others --exclude-standard --deduplicate | xargs -0 cp --parents -t "$root/src"
	cp "$binary" "$root/test"
	printf '#!/bin/sh\ncd "/src/%s" && SIDEGATE_TEST_BINARY=/sidegate exec /test "$@"\n' "$(realpath --relative-to=. "$here")" >"$root/run-test"
	chmod 755 "$root/run-test"
	{ # a command line for env(1); what tests are told by the environment they are told there too
		env -0 | grep -z '^SIDEGATE_' || true
		printf '%s\0' /run-test "$@"
	} >"$root/arguments"
}

tree=$(scripts/kernel.sh "$kernel")
fill "$work/root" "$@"
(cd "$work/root" && find . | cpio -o -H newc --quiet >"$work/image")

# One processor: with two, Debian's kernels were seen to panic in emulation. After a panic the machine restarts, which
# is its end here; what was then unfinished has failed.
timeout --foreground 1800 qemu-system-x86_64 -machine q35 -accel tcg,thread=multi -cpu max -smp 1 -m 1024 \
	-nodefaults -display none -no-reboot -kernel "$tree/vmlinuz" -initrd "$work/image" \
	-append 'console=ttyS0 quiet nokaslr mitigations=off panic=-1' \
	-serial "file:$work/console" -serial stdio </dev/null || die "the virtual machine was ended: $?"
code=$(sed -n 's/^the test ended with \([0-9]*\)\r*$/\1/p' "$work/console")
[[ $code ]] || {
	cat "$work/console" >&2
	die 'the virtual machine did not live until the end of the test (above: its console)'
}
exit "$code"
