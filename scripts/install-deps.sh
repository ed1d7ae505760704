#!/usr/bin/env bash
# Installs what a make target needs and this machine lacks, on Debian and Ubuntu.
#
#   scripts/install-deps.sh [--if-root] GROUP...     demo, image, test, browser, bench, vm, lint, generate, or all
#
# With --if-root, a user who may not install is told what is missing, and that is no failure.
# Costs milliseconds when nothing is missing: presence is a command in PATH, or a file, not a question to apt.
set -euo pipefail
PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin # servers live there, and not every user's PATH has it

# group, command or file that shows that it is there, Debian package
needs='
demo      danted          dante-server
demo      dnsmasq         dnsmasq-base
demo      ip              iproute2

image     git             git
image     busybox         busybox-static
image     cpio            cpio
image     depmod          kmod
image     dpkg-deb        dpkg
image     grub-mkimage    grub-common
image     /usr/lib/grub/i386-pc/boot.img grub-pc-bin
image     /usr/lib/grub/x86_64-efi/normal.mod grub-efi-amd64-bin
image     jq              jq
image     mcopy           mtools
image     mkfs.vfat       dosfstools
image     sfdisk          fdisk
image     xz              xz-utils
image     zstd            zstd

test      danted          dante-server
test      squid           squid
test      microsocks      microsocks
test      iperf3          iperf3
test      nft             nftables
test      ip              iproute2
test      ping            iputils-ping
test      curl            curl
test      git             git
test      unbound         unbound
test      dnsmasq         dnsmasq-base
test      nginx           nginx
test      dig             bind9-dnsutils
test      dnsperf         dnsperf
test      radvd           radvd
test      sysctl          procps
test      iptables        iptables
test      busybox         busybox-static
test      /usr/lib/systemd/systemd systemd

browser   chromium        chromium

bench     danted          dante-server
bench     ip              iproute2
bench     unbound         unbound
bench     dnsperf         dnsperf

vm        /usr/share/OVMF/OVMF_CODE_4M.fd ovmf
vm        podman          podman
vm        crun            crun
vm        qemu-system-x86_64 qemu-system-x86
vm        busybox         busybox-static
vm        cpio            cpio
vm        depmod          kmod
vm        wg              wireguard-tools
vm        radvd           radvd

lint      clang-format-19 clang-format-19
lint      shellcheck      shellcheck

generate  clang-19        clang-19
generate  llvm-strip-19   llvm-19
'

# systemd is for tests that start it in namespaces. Its package pulls in libraries and mount(8), and makes it nobody's init: that is systemd-sysv's.

# The daemons among these packages: installing a test peer must not leave a server running on the
# machine, now or after the next boot.
services='danted squid microsocks iperf3 nftables unbound unbound-resolvconf nginx radvd'

# What a system may lack without being the wrong one: tests that need it are skipped, and say so.
# Ubuntu has Chromium as a snap only, which cannot be started inside a network namespace.
optional=' chromium podman crun '

say() { printf 'install-deps: %s\n' "$*" >&2; }
die() {
	say "$@"
	exit 1
}

if_root=no
if [[ ${1-} == --if-root ]]; then
	if_root=yes
	shift
fi
groups=" $* "
[[ $groups == *' all '* ]] && groups=' demo image test browser bench vm lint generate '
for group in $groups; do
	grep -q "^$group " <<<"$needs" || die "unknown group \"$group\" (have: demo, image, test, browser, bench, vm, lint, generate, all)"
done
[[ ${groups// /} ]] || die 'which group? (have: demo, image, test, browser, bench, vm, lint, generate, all)'

present() { [[ -e $1 ]] || command -v "$1" >/dev/null; }

missing_commands=() missing_packages=()
while read -r group command package; do
	[[ $group && $groups == *" $group "* ]] || continue
	present "$command" && continue
	[[ " ${missing_packages[*]-} " == *" $package "* ]] && continue
	missing_commands+=("$command")
	missing_packages+=("$package")
done <<<"$needs"
[[ ${#missing_packages[@]} -eq 0 ]] && exit 0

if [[ -e /etc/NIXOS ]]; then
	[[ -e $(dirname "$0")/../flake.nix ]] && die "missing: ${missing_commands[*]}; enter the development shell first: nix develop"
	die "missing: ${missing_commands[*]}; on NixOS these are not installed by a script: put them into a shell with nix-shell -p"
fi
if ! command -v apt-get >/dev/null; then
	die "missing: ${missing_commands[*]}; this is neither Debian nor Ubuntu: install them with your own package manager"
fi
if [[ $EUID -ne 0 && $if_root == yes ]]; then
	say "missing: ${missing_commands[*]}; going on without them, for installing needs root: sudo apt-get install ${missing_packages[*]}"
	exit 0
elif [[ $EUID -ne 0 ]]; then
	die "missing: ${missing_commands[*]}; installing needs root: sudo apt-get install ${missing_packages[*]}"
fi

work=$(mktemp -d)
undo_policy=:
cleanup() {
	$undo_policy
	rm -rf "$work"
}
trap cleanup EXIT

# A private archive directory: some container images delete the shared one after every apt run,
# under the feet of another. _apt, who downloads, must be able to enter it.
chmod 755 "$work"
mkdir -p "$work/archives/partial"
apt() {
	DEBIAN_FRONTEND=noninteractive apt-get -qq -y -o "Dir::Cache::archives=$work/archives" \
		-o DPkg::Lock::Timeout=200 -o APT::Sandbox::User=root -o Dpkg::Use-Pty=0 \
		"$@" </dev/null >"$work/log" 2>&1
}
quote_log() { sed 's/^/    /' "$work/log" >&2; }

# apt waits for dpkg's lock but not for that of the package lists.
update() {
	local deadline=$((SECONDS + 200))
	until apt update; do
		grep -q 'Could not get lock' "$work/log" && ((SECONDS < deadline)) || return 1
		sleep 2
	done
}

say "missing: ${missing_commands[*]}"
say 'reading the package lists …'
update || {
	quote_log
	die 'apt-get update failed (above); without it the packages cannot be found'
}

installable=() absent=' '
for package in "${missing_packages[@]}"; do
	candidate=$(LC_ALL=C apt-cache policy "$package" | awk '$1 == "Candidate:" { print $2 }')
	# A candidate of Ubuntu's that only fetches a snap says so in its version.
	if [[ $candidate && $candidate != '(none)' && $candidate != *snap* ]]; then
		installable+=("$package")
		continue
	fi
	if [[ $optional == *" $package "* ]]; then
		say "this system has no package $package: what needs it is skipped"
		absent+="$package "
		continue
	fi
	quote_log # a mirror that does not answer is only a warning to apt
	die "the package lists have no $package: is a mirror out of reach (above), or is this older than Debian 12 or Ubuntu 24.04?"
done

# invoke-rc.d asks policy-rc.d before it starts anything; 101 means: do not.
if [[ ! -e /usr/sbin/policy-rc.d ]]; then
	printf '#!/bin/sh\nexit 101\n' >/usr/sbin/policy-rc.d
	chmod 755 /usr/sbin/policy-rc.d
	undo_policy='rm -f /usr/sbin/policy-rc.d'
fi
units() { systemctl list-unit-files --no-legend --state=enabled "${@/%/.service}" "${@/%/.socket}" 2>/dev/null | awk '{ print $1 }' | sort; }
read -ra service_names <<<"$services"
enabled_before=$(units "${service_names[@]}" || true)

[[ ${#installable[@]} -eq 0 ]] && exit 0
say "installing ${installable[*]} …"
apt install --no-install-recommends "${installable[@]}" || {
	quote_log
	die 'apt-get install failed (above)'
}

for unit in $(comm -13 <(echo "$enabled_before") <(units "${service_names[@]}" || true)); do
	systemctl disable --quiet "$unit" 2>/dev/null || say "could not disable $unit: it will start at the next boot"
done

hash -r
for command in "${missing_commands[@]}"; do
	[[ $absent == *" $command "* ]] && continue # an optional package is called as its command
	present "$command" || die "$command is still missing after the installation"
done
say "done in $SECONDS s"
