#!/usr/bin/env bash
# Prints the directory of a kernel of this Debian, downloaded and unpacked, never installed: boot/vmlinuz-*, and lib/modules/* with
# modules that are not compressed and depmod's tables.
#
#   scripts/kernel.sh linux-image-6.12-cloud-amd64
#
# A metapackage stands for what it depends on. The directory is kept in the cache, by the package's version.
set -euo pipefail
PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin
kernel=$1
cache=${XDG_CACHE_HOME:-$HOME/.cache}/sidegate/kernels
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

package=$(LC_ALL=C apt-cache depends "$kernel" | awk '$1 == "Depends:" && $2 ~ /^linux-image-/ { print $2; exit }')
package=${package:-$kernel}
version=$(LC_ALL=C apt-cache policy "$package" | awk '$1 == "Candidate:" { print $2 }')
[[ $version && $version != '(none)' ]] || {
	echo "kernel.sh: this system has no package $kernel: apt-get update, or name another of apt-cache search linux-image" >&2
	exit 1
}
dir=$cache/${package}_$version
if [[ ! -e $dir ]]; then
	(cd "$work" && apt-get -qq -o APT::Sandbox::User=root download "$package=$version") >&2
	dpkg-deb -x "$work/$package"_*.deb "$work/kernel"
	find "$work/kernel/lib/modules" -name '*.ko.xz' -exec xz -d {} +
	depmod -b "$work/kernel" "$(ls "$work/kernel/lib/modules")"
	mkdir -p "$cache"
	mv -T "$work/kernel" "$dir" || [[ -e $dir ]] # another was faster
fi
echo "$dir"
