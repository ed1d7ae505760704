#!/usr/bin/env bash
# Runs every fuzz target of the given packages for a while: scripts/fuzz.sh TIME PACKAGES...
# Shortening an input that is new counts as part of TIME, so it is bounded: with 10 s a run of 5 s may try no more than the seeds.
# A failing input is left in the package's testdata/fuzz, where go test finds it again.
set -euo pipefail
cd "$(dirname "$0")/.."
time=$1
shift

# go test -list prints the names of a package's targets, and then the package.
listing=$(go test -list '^Fuzz' "$@")
targets=() names=()
while read -r word package _; do
	case $word in
	Fuzz*) names+=("$word") ;;
	ok)
		for name in "${names[@]}"; do targets+=("$package $name"); done
		names=()
		;;
	esac
done <<<"$listing"

if [[ ${#targets[@]} -eq 0 ]]; then
	echo 'fuzz: there are no fuzz targets in these packages'
	exit
fi
echo "fuzz: ${#targets[@]} targets, $time each, $(nproc) at a time"
results=$(mktemp -d)
trap 'rm -rf "$results"' EXIT

fuzz() {
	local package=$1 name=$2 begun=$SECONDS output
	if output=$(go test -run='^$' -fuzz="^$name\$" -fuzztime="$time" -fuzzminimizetime=1s -parallel=1 "$package" 2>&1); then
		echo "ok    ${package##*/} $name  $(grep '^fuzz: elapsed' <<<"$output" | tail -1 | sed 's/^fuzz: //')"
	elif [[ $output == *'context deadline exceeded'* && $output != *'Failing input written'* ]]; then
		# the worker was in the middle of an input when the time was over, and go test calls that a failure: nothing was found
		echo "ok    ${package##*/} $name  stopped at its time limit"
	else
		printf 'FAIL  %s %s  (%d s)\n%s\n' "${package##*/}" "$name" $((SECONDS - begun)) "$output"
		touch "$results/$name.${package##*/}"
	fi
}

running=0
for target in "${targets[@]}"; do
	if ((running == $(nproc))); then
		wait -n
		running=$((running - 1))
	fi
	read -r package name <<<"$target"
	fuzz "$package" "$name" &
	running=$((running + 1))
done
wait
failed=$(find "$results" -type f | wc -l)
echo "fuzz: ${#targets[@]} targets, $failed failed"
((failed == 0))
