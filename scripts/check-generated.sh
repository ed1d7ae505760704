#!/usr/bin/env bash
# Generates again, in a copy of this tree, and fails if the result differs from what is committed here.
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/install-deps.sh generate

copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
git ls-files --cached --others --exclude-standard -z | tar --null --ignore-failed-read -cf - -T - 2>/dev/null | tar -xf - -C "$copy"

# From nothing: a file that is no longer generated must not look current.
generated() { (cd "$1" && find appliance -name '*_bpfel.go' -o -name '*_bpfel.o' | sort); }
before=$(generated .)
[[ $before ]] || {
	echo 'check-generated: nothing generated is committed: make generate' >&2
	exit 1
}
(cd "$copy" && generated . | xargs rm -f && make --no-print-directory generate)

different=0
while read -r file; do
	cmp --silent "$file" "$copy/$file" && continue
	different=1
	echo "check-generated: $file is not what bpf/ compiles to" >&2
	[[ $file == *.go ]] && { diff -u "$file" "$copy/$file" | head -40 >&2 || true; }
done < <(printf '%s\n%s\n' "$before" "$(generated "$copy")" | sort -u)
[[ $different == 0 ]] || {
	echo 'check-generated: run make generate and commit the result' >&2
	exit 1
}
echo "check-generated: $(wc -l <<<"$before") files are what bpf/ compiles to"
