{
  config,
  lib,
  pkgs,
  ...
}:
let
  cfg = config.services.sidegate;
  appliance = lib.importJSON ../images/appliance.json;
  written = (pkgs.formats.json { }).generate "sidegate.json" cfg.settings;

  # What run would refuse is refused now. Secrets are not here: each is a file with something in it.
  checked = pkgs.runCommand "sidegate.json" { nativeBuildInputs = [ cfg.package ]; } ''
    export CREDENTIALS_DIRECTORY=$PWD/credentials
    mkdir credentials
    ${lib.concatMapStrings (name: "echo none >credentials/${lib.escapeShellArg name}\n") (
      lib.attrNames cfg.secrets
    )}
    cp ${written} sidegate.json
    sidegate check -c sidegate.json
    cp sidegate.json $out
  '';
  systemctl = "${config.systemd.package}/bin/systemctl";
  sleep = lib.getExe' pkgs.coreutils "sleep";
  file = if cfg.checkSettings then checked else written;
in
{
  config = lib.mkIf cfg.enable {
    environment.systemPackages = [ cfg.package ];
    environment.etc."sidegate/sidegate.json".source = file;

    users.users.sidegate = {
      isSystemUser = true;
      group = "sidegate";
    };
    users.groups.sidegate = { }; # whose members may use the command line

    # The pins: directories of the BPF file system are root's, and this one is lent to the service.
    systemd.tmpfiles.settings."10-sidegate"."/sys/fs/bpf/sidegate".d = {
      mode = "0700";
      user = "sidegate";
      group = "sidegate";
    };

    systemd.services.sidegate = {
      description = "Side-router gateway";
      wantedBy = [ "multi-user.target" ];
      # Before the box forwards anything: until then all would go direct. Interfaces, addresses and routes are awaited by the gateway itself.
      wants = [ "network-pre.target" ];
      before = [ "network-pre.target" ];
      after = [
        "nftables.service"
        "systemd-sysctl.service"
        "systemd-tmpfiles-setup.service"
      ];
      reloadTriggers = [ file ];
      unitConfig.RequiresMountsFor = "/sys/fs/bpf";
      startLimitIntervalSec = 0; # clients have no other gateway
      serviceConfig = {
        Type = "notify";
        ExecStart = lib.concatStringsSep " " [
          (lib.getExe cfg.package)
          "run"
          "-c ${cfg.file}"
          "--state-dir /run/sidegate/bpf"
          "--socket-group sidegate"
        ];
        ExecReload = "${lib.getExe cfg.package} reload"; # which fails where the new settings are refused
        Restart = "always";
        RestartSec = 1;
        RestartKillSignal = "SIGUSR2"; # the kernel's part stays for the successor: direct flows go on
        # And so it does when the box goes down, which forwards until it is off.
        ExecStop = "+/bin/sh -c 'if [ $$(${systemctl} is-system-running) = stopping ]; then kill -USR2 $MAINPID; while kill -0 $MAINPID; do ${sleep} 0.1; done; fi'";
        WatchdogSec = 60;

        User = "sidegate";
        Group = "sidegate";
        AmbientCapabilities = appliance.capabilities;
        CapabilityBoundingSet = appliance.capabilities;
        LoadCredential = lib.mapAttrsToList (name: path: "${name}:${path}") cfg.secrets;
        RuntimeDirectory = "sidegate";
        RuntimeDirectoryMode = "0755";
        RuntimeDirectoryPreserve = "restart";
        StateDirectory = "sidegate";
        BindPaths = [ "/sys/fs/bpf/sidegate:/run/sidegate/bpf" ];
        ReadOnlyPaths = [ "/etc/sidegate" ];

        NoNewPrivileges = true;
        ProtectSystem = "strict";
        ProtectHome = true;
        ProtectClock = true;
        ProtectControlGroups = true;
        ProtectHostname = true;
        ProtectKernelLogs = true;
        ProtectKernelModules = true;
        ProtectKernelTunables = true;
        ProtectProc = "invisible";
        PrivateTmp = true;
        PrivateDevices = true;
        LockPersonality = true;
        MemoryDenyWriteExecute = true;
        RestrictNamespaces = true;
        RestrictRealtime = true;
        RestrictSUIDSGID = true;
        RestrictAddressFamilies = [
          "AF_UNIX"
          "AF_INET"
          "AF_INET6"
          "AF_NETLINK"
          "AF_PACKET"
        ];
        SystemCallArchitectures = "native";
        SystemCallFilter = [
          "@system-service"
          "bpf"
        ];
        SystemCallErrorNumber = "EPERM";
        UMask = "0077";
      };
    };
  };
}
