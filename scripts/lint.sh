#!/usr/bin/env bash
# Every check that needs no test to run; all are tried, then one exit code. --fix formats instead of complaining.
set -euo pipefail
cd "$(dirname "$0")/.."

tool() { go tool -modfile=scripts/tools/go.mod "$@"; } # versions are pinned there, apart from sidegate's own

# What git would commit, so that the machine's stray files are nobody's failure.
files() { git ls-files --cached --others --exclude-standard --deduplicate -- "$@" | while read -r f; do [[ -e $f ]] && echo "$f"; done; }
mapfile -t go_files < <(files '*.go' | grep -v '_bpfel\.go$')
mapfile -t c_files < <(files 'bpf/*.c' 'bpf/*.h' | grep -v '^bpf/headers/')
mapfile -t shell_files < <(
	files '*.sh'
	files .ci/run
)

if [[ ${1-} == --fix ]]; then
	tool gofumpt -w "${go_files[@]}"
	clang-format-19 -i "${c_files[@]}"
	exit
fi

failed=()
check() { # NAME COMMAND...: silent when all is well
	local name=$1 begun=$SECONDS output
	shift
	if output=$("$@" 2>&1); then
		printf 'ok    %-14s (%d s)\n' "$name" $((SECONDS - begun))
	else
		printf 'FAIL  %-14s (%d s)\n%s\n' "$name" $((SECONDS - begun)) "$output"
		failed+=("$name")
	fi
}

gofumpt() {
	local unformatted
	unformatted=$(tool gofumpt -l "${go_files[@]}") || {
		echo "$unformatted"
		return 1
	}
	[[ -z $unformatted ]] || {
		printf '%s\nnot formatted: make fmt\n' "$unformatted"
		return 1
	}
}
modules() {
	go mod tidy -diff && go mod verify
}
shell_syntax() {
	local f
	for f in "${shell_files[@]}"; do bash -n "$f" || return 1; done
}

check gofumpt gofumpt
check clang-format clang-format-19 --dry-run --Werror "${c_files[@]}"
check vet go vet ./...
check staticcheck tool staticcheck ./...
check bash shell_syntax
check shellcheck shellcheck "${shell_files[@]}"
check modules modules
check licences go run ./scripts/licences ./...

[[ ${#failed[@]} -eq 0 ]] || {
	echo "lint: failed: ${failed[*]}" >&2
	exit 1
}
