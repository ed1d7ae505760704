# shellcheck shell=dash
# What a drive with a configuration means, for both appliances: the one without Nix (attend.sh) and that of NixOS (nixos-module/appliance.nix).
# They say where the configuration is (CONFIGURATION), which program looks at it (PROGRAM), and whether one is in force already (CONFIGURATION_IN_FORCE).

say() { echo "<6>appliance: $*" >/dev/kmsg; }

# take copies the files of the drive $1 to where the gateway reads them.
take() {
	local kind refusal from=/run/drive new=/run/configuration
	mkdir -p $from
	for kind in vfat iso9660 ext4 exfat; do
		mount -t $kind -o ro "$1" $from 2>/dev/null && break
	done || return
	rm -rf $new
	mkdir -m 700 $new
	find $from -maxdepth 1 -type f -exec cp {} $new \;
	umount $from
	if [ ! -e $new/sidegate.yaml ] && [ ! -e $new/network ]; then
		say "the drive $1, labelled $2, has neither sidegate.yaml nor network"
		return 1
	fi
	[ -e $new/sidegate.yaml ] || cp "$CONFIGURATION/sidegate.yaml" $new
	sed -i 's/\r$//' $new/network 2>/dev/null # it may have been written on Windows
	rm -f /run/refused
	# Once there is a policy in force it stays until there is a better one. At the start there is none, and a default would let out what is to be kept in.
	if [ "$CONFIGURATION_IN_FORCE" ] && ! refusal=$(cd $new && "$PROGRAM" check -c sidegate.yaml 2>&1); then
		printf '%s\n' "The drive $1, labelled $2, is refused, and what was before stays:" "$refusal" >/run/refused
		say "the configuration of the drive $1, labelled $2, is refused: $refusal"
		return 1
	fi
	rm -rf "$CONFIGURATION"
	mv $new "$CONFIGURATION"
	echo "$1, labelled $2" >/run/configured-by
	say "the configuration is that of the drive $1, labelled $2"
}

# setting prints the values of a key of the file "network".
setting() { sed -n "s/^[[:space:]]*$1[[:space:]]*=[[:space:]]*\([^#[:space:]]*\).*/\1/p" "$CONFIGURATION/network" 2>/dev/null; }
