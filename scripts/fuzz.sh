#!/usr/bin/env bash
# Runs every fuzz target of the given packages for a while: scripts/fuzz.sh TIME PACKAGES...
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
echo "fuzz: ${#targets[@]} targets, $time each"
failed=()
for target in "${targets[@]}"; do
	read -r package name <<<"$target"
	begun=$SECONDS
	if output=$(go test -run='^$' -fuzz="^$name\$" -fuzztime="$time" -fuzzminimizetime=10s "$package" 2>&1); then
		last=$(grep '^fuzz: elapsed' <<<"$output" | tail -1)
		echo "ok    $name  ${last#fuzz: }"
	else
		printf 'FAIL  %s  (%d s)\n%s\n' "$name" $((SECONDS - begun)) "$output"
		failed+=("$name")
	fi
done
echo "fuzz: ${#targets[@]} targets, ${#failed[@]} failed"
[[ ${#failed[@]} -eq 0 ]]
