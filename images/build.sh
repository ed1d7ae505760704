#!/usr/bin/env bash
# Builds the appliance without Nix, from a kernel and busybox of this Debian and bin/sidegate:
#
#   images/build.sh KERNEL DIRECTORY     KERNEL as scripts/kernel.sh has it, such as linux-image-6.12-amd64
#
#   DIRECTORY/sidegate.img.gz            a disk that PCs and virtual machines start from, by UEFI or BIOS
#   DIRECTORY/oci                        the gateway alone, as an OCI image layout
#
# What is in it is said by appliance.json. Nothing is installed or mounted, and nothing needs root. The same sources and
# packages make the same bytes.
set -euo pipefail
PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin
cd "$(dirname "$0")/.."
[[ $# -eq 2 ]] || {
	sed -n '2,/^set/s/^# \{0,1\}//p' images/build.sh >&2
	exit 2
}
kernel=$(scripts/kernel.sh "$1")
out=$2
release=$(ls "$kernel/lib/modules")
SOURCE_DATE_EPOCH=$(git log -1 --format=%ct 2>/dev/null || echo 1)
export SOURCE_DATE_EPOCH
if ldd "$(command -v busybox)" >/dev/null 2>&1; then
	echo 'build.sh: busybox needs libraries here: install busybox-static' >&2
	exit 1
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
rm -rf "$out"
mkdir -p "$out"

appliance() { jq -r "$1" images/appliance.json; }
megabytes() { awk "BEGIN { printf \"%.1f MB\", $(stat -c %s "$1") / 1e6 }"; }

# configuration is the default one, as a file for people.
configuration() {
	cat <<-'END'
		# The gateway's configuration; the README says what else there is. Beside this file may lie what it names, and "network":
		#   address = 192.168.0.2/24
		#   gateway = 192.168.0.1
	END
	appliance '.settings | to_entries[] | "\(.key): \(.value | tojson)"'
}

# modules prints the files of those that the appliance has and of what they need, as this kernel calls them.
modules() {
	appliance '.modules[][]' | awk -v table="$kernel/lib/modules/$release/modules.dep" '
		function name(path) { gsub(/.*\/|\.ko.*/, "", path); gsub(/-/, "_", path); return path }
		BEGIN { FS = ": *"; while ((getline <table) > 0) { path[name($1)] = $1; needs[name($1)] = $2 } }
		$1 in path { print path[$1]; n = split(needs[$1], all, " "); for (i = 1; i <= n; i++) print all[i] }
	' | sort -u
}

# initramfs is the whole system: it lives in memory, and nothing of it is on a disk that could break.
initramfs() {
	local root=$work/root target
	mkdir -p "$root"/{bin,dev,etc,proc,root,run,sys,tmp,usr/bin} "$root/lib/modules/$release"
	cp "$(command -v busybox)" "$root/bin/busybox"
	ln -s /bin/busybox "$root/init"
	for target in $(appliance '.files | keys[]'); do
		mkdir -p "$root$(dirname "$target")"
		cp "images/rootfs/$(appliance ".files[\"$target\"]")" "$root$target"
	done
	appliance '
		"HOST=\(.hostname)", "CONFIGURATION_LABEL=\(.label.configuration)", "BOOT_LABEL=\(.label.boot)",
		"PROGRAM=\(.paths.program)", "CONFIGURATION=\(.paths.configuration)", "DATA=\(.paths.data)"' >"$root/usr/lib/sidegate/appliance"
	install -D bin/sidegate "$root$(appliance .paths.program)"
	install -d -m 700 "$root$(appliance .paths.configuration)"
	configuration >"$root$(appliance .paths.configuration)/sidegate.yaml"
	printf 'root:x:0:0::/root:/bin/sh\n' >"$root/etc/passwd"
	printf 'root:x:0:\n' >"$root/etc/group"
	modules | (cd "$kernel/lib/modules/$release" && xargs cp --parents -t "$root/lib/modules/$release" modules.order modules.builtin modules.builtin.modinfo)
	depmod -b "$root" "$release"
	rm "$root/lib/modules/$release"/*.bin
	find "$root" -exec touch -h -d "@$SOURCE_DATE_EPOCH" {} +
	# Level 19 would save one megabyte of 24, and take ten times as long.
	(cd "$root" && find . | LC_ALL=C sort | cpio -o -H newc -R 0:0 --reproducible --quiet) | zstd -q -12 -T0 >"$work/initramfs"
}

# The disk: a GPT with a partition for GRUB's BIOS half, and one of FAT that UEFI starts from and owners of any system can write to.
# In sectors of 512 bytes:
bios=2048
bios_size=2048
fat=4096
fat_size=$((96 * 2048))

# grub makes GRUB for a platform in file $2; it reads grub.cfg of the drive that it was started from.
grub() {
	local platform=$1 file=$2
	shift 2
	grub-mkimage -O "$platform" -o "$file" -p '(,gpt2)/grub' part_gpt fat normal linux all_video gfxterm "$@"
}

# patch writes the bytes $3, in octal escapes, into file $1 at offset $2.
patch() { printf '%b' "$3" | dd of="$1" bs=1 seek="$2" conv=notrunc status=none; }
# little prints a number in $2 bytes, the lowest first.
little() { for ((i = 0; i < $2; i++)); do printf '\\0%03o' $(($1 >> 8 * i & 255)); done; }

disk() {
	local disk=$work/disk boot=$work/fat core=$work/core
	truncate -s $(((fat + fat_size + 2048) * 512)) "$disk"
	sfdisk -q "$disk" <<-END
		label: gpt
		label-id: 5364E6A7-0000-4000-8000-000000000000
		start=$bios, size=$bios_size, type=21686148-6449-6E6F-744E-656564454649, uuid=5364E6A7-0000-4000-8000-000000000001, name=bios
		start=$fat, size=$fat_size, type=C12A7328-F81F-11D2-BA4B-00A0C93EC93B, uuid=5364E6A7-0000-4000-8000-000000000002, name=$(appliance .label.boot)
	END

	truncate -s $((fat_size * 512)) "$boot"
	mkfs.vfat -F 32 -s 1 -n "$(appliance .label.boot)" --invariant "$boot" >/dev/null
	mkdir -p "$work/files/EFI/BOOT" "$work/files/grub"
	cp "$kernel/vmlinuz" "$work/files/vmlinuz"
	cp "$work/initramfs" "$work/files/initramfs"
	configuration | sed 's/$/\r/' >"$work/files/sidegate.yaml" # Windows' editors want it so, and the others do not mind
	cat >"$work/files/grub/grub.cfg" <<-'END'
		linux /vmlinuz console=ttyS0,115200 console=tty0 quiet panic=10 printk.devkmsg=on
		initrd /initramfs
		boot
	END
	grub x86_64-efi "$work/files/EFI/BOOT/BOOTX64.EFI" efi_gop efi_uga
	find "$work/files" -exec touch -d "@$SOURCE_DATE_EPOCH" {} +
	mcopy -s -m -i "$boot" "$work/files"/* ::
	dd if="$boot" of="$disk" bs=512 seek=$fat conv=notrunc,sparse status=none

	# What grub-bios-setup does, without a device: the boot sector learns where the core begins, and the core where its rest is.
	grub i386-pc "$core" biosdisk vbe vga
	((($(stat -c %s "$core") + 511) / 512 <= bios_size))
	patch "$core" $((0x1f4)) "$(little $((bios + 1)) 8)"
	dd if="$core" of="$disk" bs=512 seek=$bios conv=notrunc status=none
	cp /usr/lib/grub/i386-pc/boot.img "$work/boot"
	patch "$work/boot" $((0x5c)) "$(little $bios 8)"
	patch "$work/boot" $((0x66)) '\0220\0220' # do not believe a BIOS that names a floppy
	dd if="$work/boot" of="$disk" bs=440 count=1 conv=notrunc status=none

	gzip -n -1 <"$disk" >"$out/sidegate.img.gz" # for its empty half: what is in the other is compressed
}

# blob adds a file to the OCI layout and prints its descriptor, of media type $2.
blob() {
	local digest
	digest=$(sha256sum "$1" | cut -d ' ' -f 1)
	cp "$1" "$out/oci/blobs/sha256/$digest"
	jq -nc --arg type "$2" --arg digest "sha256:$digest" --argjson size "$(stat -c %s "$1")" '{mediaType: $type, digest: $digest, size: $size}'
}

oci() {
	local root=$work/layer media=application/vnd.oci.image layer config
	mkdir -p "$out/oci/blobs/sha256"
	install -D bin/sidegate "$root$(appliance .paths.program)"
	install -d "$root/run" "$root/tmp" "$root$(appliance .paths.data)" "$root$(appliance .paths.configuration)"
	configuration >"$root$(appliance .paths.configuration)/sidegate.yaml"
	tar -C "$root" --sort=name --owner=0 --group=0 --numeric-owner --mtime="@$SOURCE_DATE_EPOCH" -cf "$work/layer.tar" .
	gzip -n <"$work/layer.tar" >"$work/layer.tar.gz"
	layer=$(blob "$work/layer.tar.gz" $media.layer.v1.tar+gzip)
	jq -c --arg diff "sha256:$(sha256sum "$work/layer.tar" | cut -d ' ' -f 1)" --arg version "$(bin/sidegate version)" '{
		architecture: "amd64", os: "linux",
		config: {
			Entrypoint: [.paths.program, "run", "-c", (.paths.configuration + "/sidegate.yaml"), "--data-dir", .paths.data],
			Volumes: {(.paths.data): {}}, StopSignal: "SIGTERM", Labels: {"org.opencontainers.image.version": $version}
		},
		rootfs: {type: "layers", diff_ids: [$diff]}
	}' images/appliance.json >"$work/config.json"
	config=$(blob "$work/config.json" $media.config.v1+json)
	jq -nc --arg media $media --argjson config "$config" --argjson layer "$layer" \
		'{schemaVersion: 2, mediaType: ($media + ".manifest.v1+json"), config: $config, layers: [$layer]}' >"$work/manifest.json"
	blob "$work/manifest.json" $media.manifest.v1+json |
		jq -c '{schemaVersion: 2, manifests: [. + {annotations: {"org.opencontainers.image.ref.name": "latest"}, platform: {architecture: "amd64", os: "linux"}}]}' >"$out/oci/index.json"
	echo '{"imageLayoutVersion":"1.0.0"}' >"$out/oci/oci-layout"
}

initramfs
disk
oci
echo "$out/sidegate.img.gz: $(megabytes "$out/sidegate.img.gz"), $release"
echo "$out/oci: $(du -sh "$out/oci" | cut -f 1)"
