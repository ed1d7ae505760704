#!/usr/bin/env bash
# What can be known of the Nix files without building anything. Each check says whether it is ok, failed, or what it lacks.
#
# With a nixpkgs tree, named by NIXPKGS_FLAKE as --override-input takes it, everything is evaluated to a derivation too, and what the module
# makes of nix/cases.nix is compared with nixos-module/goldens. --write makes the goldens anew.
set -euo pipefail
cd "$(dirname "$0")/.."

failed=()
check() { # NAME COMMAND...: silent when all is well
	local name=$1 begun=$SECONDS output
	shift
	if output=$("$@" 2>&1); then
		printf 'ok    %-22s (%d s)\n' "$name" $((SECONDS - begun))
	else
		printf 'FAIL  %-22s (%d s)\n%s\n' "$name" $((SECONDS - begun)) "$output"
		failed+=("$name")
	fi
}
skip() { printf 'skip  %-22s %s\n' "$1" "$2"; }

mapfile -t files < <(git ls-files --cached --others --exclude-standard --deduplicate -- '*.nix' | while read -r f; do [[ -e $f ]] && echo "$f"; done)

parse() {
	local f
	for f in "${files[@]}"; do nix-instantiate --parse "$f" >/dev/null || return 1; done
}

# buildGoModule's vendorHash is that of what go mod vendor writes.
vendor_hash() {
	local work have want
	work=$(mktemp -d)
	go mod vendor -o "$work/vendor"
	want=$(nix hash path "$work/vendor")
	rm -rf "$work"
	have=$(sed -n 's/.*vendorHash = "\(.*\)";.*/\1/p' nix/package.nix)
	[[ $have == "$want" ]] || {
		echo "nix/package.nix has vendorHash = \"$have\", and the modules in go.mod make \"$want\""
		return 1
	}
}

with_nixpkgs=(--no-write-lock-file --override-input nixpkgs "${NIXPKGS_FLAKE-}")
goldens() { # WRITE?
	local work status=0
	work=$(mktemp -d)
	nix eval --write-to "$work/goldens" .#lib.cases.goldens "${with_nixpkgs[@]}" || return 1
	if [[ $1 == --write ]]; then
		rm -rf nixos-module/goldens
		cp -r "$work/goldens" nixos-module/goldens
	else
		diff -ru nixos-module/goldens "$work/goldens" || status=1
		[[ $status == 0 ]] || echo 'the goldens are not what the module makes: if it is what you want, scripts/nix-check.sh --write'
	fi
	rm -rf "$work"
	return $status
}

# What the module system itself refuses: the case, and what its message must say.
mistakes() {
	local name says output
	while IFS='|' read -r name says; do
		if output=$(nix eval ".#lib.cases.ugly.$name" "${with_nixpkgs[@]}" 2>&1); then
			echo "$name is not refused"
			return 1
		fi
		[[ $output == *"$says"* ]] || {
			printf '%s is refused without saying "%s":\n%s\n' "$name" "$says" "$output"
			return 1
		}
	done <<'CASES'
option-typo|Did you mean `services.sidegate.settings'
second-typo|Did you mean `services.sidegate.lan.address'
type|is not of type `one of "asymmetric", "symmetric", "auto"'
CASES
}

everything() { nix flake check --no-build --all-systems "${with_nixpkgs[@]}"; }

if command -v nix >/dev/null; then
	export NIX_CONFIG="experimental-features = nix-command flakes"
	check parse parse
	check vendorHash vendor_hash
else
	skip 'parse, vendorHash' 'there is no nix here'
fi
if command -v nixfmt >/dev/null; then
	check format nixfmt --check "${files[@]}"
else
	skip format 'there is no nixfmt here'
fi
if [[ ${NIXPKGS_FLAKE-} ]] && command -v nix >/dev/null; then
	check goldens goldens "${1-}"
	check mistakes mistakes
	check 'nix flake check' everything
else
	skip 'goldens, flake check' 'needs nix, and a nixpkgs tree in NIXPKGS_FLAKE'
fi

[[ ${#failed[@]} -eq 0 ]] || {
	echo "nix-check: failed: ${failed[*]}" >&2
	exit 1
}
