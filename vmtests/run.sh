#!/usr/bin/env bash
# Runs what needs other kernels, and the image, in emulated machines: all of it, or the steps that are named.
#
#   vmtests/run.sh [STEP...]
#
# Two steps run at a time, since each machine has one processor; every line begins with its step. Root.
set -euo pipefail
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

stable=linux-image-6.12-cloud-amd64
newest=trixie-backports/linux-image-amd64

# inside KERNEL TESTS PACKAGE: tests that run in the machine.
inside() {
	CGO_ENABLED=0 go run ./scripts/testreport -count=1 -timeout=25m -exec="$PWD/vmtests/exec.sh $1" -run="^($2)\$" "$3"
}

# around KERNEL TESTS: tests in which the image is the machine. A kernel that is not to be had here proves nothing, and is no failure.
around() {
	scripts/kernel.sh "$1" >/dev/null || return 77
	local image=$work/${1##*/}
	(
		flock 9 # two steps may want the same one
		[[ -e $image ]] || images/build.sh "$1" "$image"
	) 9>"$image.lock" || return 1
	SIDEGATE_IMAGE=$image/sidegate.img.gz SIDEGATE_IMAGE_KERNEL=$1 SIDEGATE_OCI=$image/oci \
		go run ./scripts/testreport -count=1 -timeout=20m -run="^($2)\$" ./appliance/endtoend
}

# places: a kernel that has what others lack (VLAN, WireGuard). first: an image that nobody has configured; refused: one that somebody has, wrongly.
# policy: an older verifier.
steps() {
	cat <<-END
		places        inside $stable TestPlaces.*|TestPortIsEnslavedWhileItRuns|TestUnitCapabilitiesAreMinimal ./appliance/endtoend
		image         around $stable TestImage|TestContainer
		first         around $stable TestImageFirstStart
		newest        around $newest TestImage
		newest-first  around $newest TestImageFirstStart
		refused       around $stable TestImageRefused
		policy        inside $stable TestPolicyProof|TestVerifierBudget ./appliance/datapath
		old-kernel    inside linux-image-cloud-amd64 TestOldKernelIsRefused ./appliance/endtoend
	END
}

names=$(steps | cut -d ' ' -f 1)
for name; do
	grep -qx -- "$name" <<<"$names" || {
		printf 'vmtests/run.sh: there is no step "%s"; there are: %s\n' "$name" "${names//$'\n'/ }" >&2
		exit 2
	}
done

# run NAME COMMAND...: one step, and how it ended.
run() {
	local name=$1 begun=$SECONDS result=ok
	shift
	"$@" 2>&1 | sed -u "s/^/$name: /" || case $? in 77) result=skip ;; *) result=FAIL ;; esac
	printf '%-4s  %5d s  %s: %s\n' $result $((SECONDS - begun)) "$name" "$*" >"$work/$name.result"
}

export SIDEGATE_PROOF_CASES=20000 # an emulated processor is slow
while read -r name command; do
	[[ $# -eq 0 || " $* " == *" $name "* ]] || continue
	while (($(jobs -rp | wc -l) >= 2)); do wait -n || true; done
	# shellcheck disable=SC2086 # words
	run "$name" $command </dev/null &
done < <(steps)
wait
times >"$work/times" # not through a pipe, whose shell has times of its own
printf '\nvmtests/run.sh: %d s by the clock; of the processors, in user mode and in the kernel: %s\n' $SECONDS "$(tail -n 1 "$work/times")"
cat "$work"/*.result
grep -q '^ok' "$work"/*.result && ! grep -q '^FAIL' "$work"/*.result
