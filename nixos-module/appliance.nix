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
  configuration = "/run/sidegate-configuration";
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
    file = "${configuration}/sidegate.yaml";
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
    environment = {
      CONFIGURATION = configuration;
      PROGRAM = lib.getExe config.services.sidegate.package;
    };
    script = ''
      . ${../images/rootfs/drive.sh}
      udevadm settle
      [ -e "$CONFIGURATION/sidegate.yaml" ] || cp ${fallback} "$CONFIGURATION/sidegate.yaml"
      drive=/dev/disk/by-label/${label}
      CONFIGURATION_IN_FORCE=$(systemctl is-active sidegate.service | sed -n '/^active/p')
      [ ! -e "$drive" ] || take "$(readlink -f "$drive")" ${label} || true
      chown -R sidegate: "$CONFIGURATION"
      systemctl --no-block try-reload-or-restart sidegate.service
      if [ -e "$CONFIGURATION/network" ]; then # which counts at a start
        mkdir -p /run/systemd/network
        {
          printf '[Match]\nName=%s\n[Network]\n' "$(setting interface | grep . || echo 'en* eth*')"
          setting address | sed 's/^/Address=/'
          setting gateway | sed 's/^/Gateway=/'
          setting dns | sed 's/^/DNS=/'
        } >/run/systemd/network/05-sidegate.network
      fi
    '';
  };
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
