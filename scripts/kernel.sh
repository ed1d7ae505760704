#!/usr/bin/env bash
# Prints the directory of a kernel of Debian, downloaded and unpacked, never installed: vmlinuz, and lib/modules/* with modules that
# are not compressed and depmod's tables.
#
#   scripts/kernel.sh linux-image-6.12-cloud-amd64
#   scripts/kernel.sh trixie-backports/linux-image-cloud-amd64     from a suite that this system does not have among its sources
#
# A metapackage stands for what it depends on. The directory is kept in the cache, by the package's version.
set -euo pipefail
PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin
kernel=${1##*/}
cache=${XDG_CACHE_HOME:-$HOME/.cache}/sidegate/kernels
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

die() {
	echo "kernel.sh: $*" >&2
	exit 1
}

options=(-o APT::Sandbox::User=root)
if [[ $1 == */* ]]; then # apt with this one source, on the mirror that the system has
	# shellcheck disable=SC2016 # apt's variables
	mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Origin: Debian' 'Label: Debian' | head -n 1)
	[[ $mirror ]] || die 'this system has no source of Debian whose mirror could be asked: apt-get update'
	mkdir -p "$work"/apt/{sources,lists/partial,archives/partial}
	printf 'Types: deb\nURIs: %s\nSuites: %s\nComponents: main\nSigned-By: /usr/share/keyrings/debian-archive-keyring.gpg\n' \
		"$mirror" "${1%/*}" >"$work/apt/sources/one.sources"
	options+=(-o Dir::Etc::SourceList=/dev/null -o "Dir::Etc::SourceParts=$work/apt/sources" -o "Dir::State::Lists=$work/apt/lists" -o "Dir::Cache=$work/apt")
	apt-get -qq "${options[@]}" update >&2 || die "the suite ${1%/*} cannot be read from $mirror"
fi

# needs prints what package $1 depends on, of the kind $2.
needs() { LC_ALL=C apt-cache "${options[@]}" depends "$1" | awk -v kind="^linux-$2-[0-9]" '$1 == "Depends:" && $2 ~ kind { print $2 }'; }

package=$(needs "$kernel" image | head -n 1)
package=${package:-$kernel}
version=$(LC_ALL=C apt-cache "${options[@]}" policy "$package" | awk '$1 == "Candidate:" { print $2 }')
[[ $version && $version != '(none)' ]] || die "there is no package $kernel: apt-get update, or name another of apt-cache search linux-image"
dir=$cache/${package}_$version
if [[ ! -e $dir ]]; then
	mapfile -t packages < <(needs "$package" '(base|binary|modules)') # its parts, from 7.3 on
	(cd "$work" && apt-get -qq "${options[@]}" download "$package" "${packages[@]}") >&2
	for file in "$work"/*.deb; do dpkg-deb -x "$file" "$work/kernel"; done
	[[ -e $work/kernel/lib ]] || mv "$work/kernel/usr/lib" "$work/kernel/lib"
	find "$work/kernel" -name 'vmlinuz*' -exec mv {} "$work/kernel/vmlinuz" \;
	find "$work/kernel/lib/modules" -name '*.ko.xz' -exec xz -d {} +
	depmod -b "$work/kernel" "$(ls "$work/kernel/lib/modules")"
	mkdir -p "$cache"
	mv -T "$work/kernel" "$dir" || [[ -e $dir ]] # another was faster
fi
echo "$dir"
