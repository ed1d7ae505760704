# A whole box, as images/appliance.json defines it: it starts without being asked anything, and is configured by files on a drive.
{
  config,
  lib,
  pkgs,
  ...
}:
let
  appliance = lib.importJSON ../images/appliance.json;
  label = appliance.label.configuration;
  fallback = config.environment.etc."sidegate/sidegate.json".source;
in
{
  networking.hostName = appliance.hostname;
  networking.useNetworkd = true; # each Ethernet interface by DHCP
  system.stateVersion = lib.mkDefault "26.05";
  boot.kernelModules = appliance.modules.network;
  hardware.enableAllHardware = true;

  # Who can touch the box owns it.
  services.getty.autologinUser = "root";
  services.getty.helpLine = ''Addresses: \4 \6. It is configured by sidegate.yaml and network on a drive labelled ${label}.'';
  programs.bash.loginShellInit = "ip -brief address; sidegate status";

  services.sidegate = {
    enable = true;
    settings = appliance.settings;
    file = "/run/sidegate-configuration/sidegate.yaml";
  };

  # The drive's files are copied, so that it may be pulled out. Again when one is plugged in.
  systemd.services.sidegate = {
    requires = [ "sidegate-configuration.service" ];
    after = [ "sidegate-configuration.service" ];
  };
  systemd.services.sidegate-configuration = {
    description = "Configuration of the gateway, from a drive labelled ${label}";
    before = [
      "sidegate.service"
      "systemd-networkd.service"
    ];
    after = [ "systemd-udev-trigger.service" ];
    wantedBy = [ "multi-user.target" ];
    unitConfig.DefaultDependencies = false;
    path = [
      pkgs.util-linux
      config.systemd.package
    ];
    serviceConfig = {
      Type = "oneshot";
      RuntimeDirectory = "sidegate-configuration";
      RuntimeDirectoryPreserve = true;
    };
    script = ''
      udevadm settle
      new=$(mktemp -d)
      cp ${fallback} "$new/sidegate.yaml"
      drive=/dev/disk/by-label/${label}
      if [ -e "$drive" ]; then
        mount -o ro "$drive" /mnt
        cp -r /mnt/. "$new"
        umount /mnt
      fi
      if [ -e "$new/network" ]; then
        mkdir -p /run/systemd/network
        {
          printf '[Match]\nName=%s\n[Network]\n' "$(sed -n 's/^ *interface *= *//p' "$new/network" | grep . || echo 'en* eth*')"
          sed -n 's/^ *address *= */Address=/p; s/^ *gateway *= */Gateway=/p; s/^ *dns *= */DNS=/p' "$new/network"
        } >/run/systemd/network/05-sidegate.network
      fi
      chown -R sidegate: "$new"
      rm -rf "$RUNTIME_DIRECTORY"/*
      cp -r --preserve=all "$new"/. "$RUNTIME_DIRECTORY"
      chown sidegate: "$RUNTIME_DIRECTORY"
      rm -rf "$new"
      systemctl --no-block try-reload-or-restart sidegate.service
    '';
  };
  systemd.tmpfiles.settings."10-sidegate"."/mnt".d.mode = "0755";
  services.udev.extraRules = ''
    ACTION=="add", SUBSYSTEM=="block", ENV{ID_FS_LABEL}=="${label}", TAG+="systemd", ENV{SYSTEMD_WANTS}+="sidegate-configuration.service"
  '';

  # Overridden by each kind of image.
  fileSystems."/" = lib.mkDefault {
    device = "/dev/disk/by-label/nixos";
    fsType = "ext4";
  };
  boot.loader.grub.device = lib.mkDefault "nodev";
}
