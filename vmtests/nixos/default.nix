# Every other file here is a side router made with the module: a NixOS system, with which the scenarios of appliance/endtoend are played
# that everything is played with. Beside it stands one machine, whose name is lab: it runs the test binary, which has the laptop, the routers and
# the servers in network namespaces, and the cable to the box.
{
  self,
  lib,
  pkgs,
}:
let
  files = lib.filterAttrs (name: _: name != "default.nix" && lib.hasSuffix ".nix" name) (
    builtins.readDir ./.
  );

  # What a box has to have; where it is written that it has: appliance/endtoend/main_test.go.
  place = {
    interface = "eth1";
    hardware = "02:00:c0:a8:00:02";
    address = [
      "192.168.0.2/24"
      "fd00:c0a8::2/64"
    ];
    gateway = [
      "192.168.0.1"
      "fd00:c0a8::1"
    ];
  };

  keys = import "${pkgs.path}/nixos/tests/ssh-keys.nix" pkgs;

  # The second cable is for commands: the first is the lab's.
  machine = control: {
    virtualisation.vlans = [
      1
      2
    ];
    networking = {
      useDHCP = false;
      interfaces.eth1.ipv4.addresses = lib.mkForce [ ];
      interfaces.eth1.ipv6.addresses = lib.mkForce [ ];
      interfaces.eth2.ipv6.addresses = lib.mkForce [ ];
      interfaces.eth2.ipv4.addresses = lib.mkForce [
        {
          address = control;
          prefixLength = 24;
        }
      ];
    };
  };
  control = "10.83.0.1";

  tests = pkgs.sidegate.overrideAttrs {
    pname = "sidegate-endtoend";
    buildPhase = "go test -c -o endtoend ./appliance/endtoend";
    installPhase = "install -D endtoend $out/bin/endtoend";
  };

  # What the tests start, by the names that Debian gives it.
  programs = with pkgs; [
    busybox
    curl
    iproute2
    nftables
    nginx
    openssh
    radvd
    unbound
    util-linux
    (writeShellScriptBin "danted" ''exec ${lib.getExe' dante "sockd"} "$@"'')
  ];

  play =
    config: scenarios:
    let
      ssh = pkgs.writeText "ssh_config" ''
        Host box
          HostName ${control}
          User root
          IdentityFile /run/key
          StrictHostKeyChecking no
          UserKnownHostsFile /dev/null
          LogLevel ERROR
          ConnectTimeout 5
          ServerAliveInterval 5
      '';
    in
    pkgs.writeShellScript "play" ''
      install -m 600 ${keys.snakeOilEd25519PrivateKey} /run/key
      export PATH=${lib.makeBinPath programs} SIDEGATE_TEST_BINARY=${lib.getExe pkgs.sidegate}
      export SIDEGATE_BOX_INTERFACE=${place.interface} SIDEGATE_BOX_SHELL='ssh -F ${ssh} box sh' SIDEGATE_BOX_CONFIG=${config}
      until ssh -F ${ssh} box true; do sleep 1; done
      exec ${tests}/bin/endtoend -test.v -test.timeout=30m -test.run='^TestElsewhere$/^(${lib.concatStringsSep "|" scenarios})$'
    '';

  test =
    name:
    {
      box,
      config,
      scenarios ? [ ".*" ],
    }:
    pkgs.testers.runNixOSTest {
      name = "sidegate-${name}";
      nodes = {
        box =
          { pkgs, ... }:
          {
            imports = [
              self.nixosModules.default
              (machine control)
              (lib.toFunction box { inherit self pkgs lib place; })
            ];
            environment.systemPackages = [
              pkgs.busybox
              pkgs.iproute2
            ];
            services.openssh.enable = true;
            users.users.root.openssh.authorizedKeys.keys = [ keys.snakeOilEd25519PublicKey ];
            systemd.services.hardware-address = {
              wantedBy = [ "network-pre.target" ];
              before = [ "network-pre.target" ];
              requires = [ "sys-subsystem-net-devices-${place.interface}.device" ];
              after = [ "sys-subsystem-net-devices-${place.interface}.device" ];
              unitConfig.DefaultDependencies = false;
              serviceConfig.Type = "oneshot";
              path = [ pkgs.iproute2 ];
              script = "ip link set ${place.interface} address ${place.hardware}";
            };
          };
        lab = {
          imports = [ (machine "10.83.0.2") ];
          networking.firewall.enable = false;
          virtualisation.memorySize = 1024;
        };
      };
      testScript = ''
        box.start(allow_reboot=True)
        lab.start()
        box.wait_for_unit("sidegate.service")
        lab.wait_for_unit("multi-user.target")
        status, told = lab.execute("${play config scenarios} 2>&1", timeout=1800)
        print(told)
        assert status == 0 and "--- PASS: TestElsewhere" in told, "the scenarios"
        assert "--- SKIP" not in told, "a scenario that was not played"
        # A name that is no scenario's selects nothing, and nothing passes.
        for scenario in ${builtins.toJSON (lib.remove ".*" scenarios)}:
            assert f"--- PASS: TestElsewhere/{scenario} (" in told, f"no scenario {scenario}"
      '';
    };
in
lib.mapAttrs' (file: _: {
  name = "vm-${lib.removeSuffix ".nix" file}";
  value = test (lib.removeSuffix ".nix" file) (import (./. + "/${file}"));
}) files
