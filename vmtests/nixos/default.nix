# Every other file here is a scenario: what is special about the box, and what is to be seen. Around it stand always the same machines, as
# in the README: a laptop whose gateway is the box, the main router, and beyond it a server and the upstream proxy.
{
  self,
  lib,
  pkgs,
}:
let
  files = lib.filterAttrs (name: _: name != "default.nix" && lib.hasSuffix ".nix" name) (
    builtins.readDir ./.
  );

  host = vlan: address: gateway: {
    virtualisation.vlans = [ vlan ];
    networking = {
      useDHCP = false;
      firewall.enable = lib.mkDefault false;
      interfaces.eth1.ipv4.addresses = lib.mkForce [
        {
          inherit address;
          prefixLength = 24;
        }
      ];
      defaultGateway = lib.mkIf (gateway != null) gateway;
    };
  };

  # Port 7 goes direct, 8 through the proxy, 9 nowhere.
  web = {
    services.nginx = {
      enable = true;
      virtualHosts = lib.genAttrs [ "7" "8" "9" ] (port: {
        listen = [
          {
            addr = "0.0.0.0";
            port = lib.toInt port;
          }
        ];
        locations."/".return = "200 $remote_addr";
      });
    };
  };

  test =
    name:
    { box, script }:
    pkgs.testers.runNixOSTest {
      name = "sidegate-${name}";
      nodes = {
        laptop = host 1 "192.168.0.3" "192.168.0.2";
        box = {
          imports = [
            self.nixosModules.default
            box
          ];
          virtualisation.vlans = [ 1 ];
          networking.useDHCP = false;
          networking.interfaces.eth1.ipv4.addresses = lib.mkForce [ ];
          services.sidegate = {
            enable = true;
            lan = {
              interface = "eth1";
              address = [ "192.168.0.2/24" ];
              gateway = [ "192.168.0.1" ];
            };
            settings = {
              outbounds.hk.url = "socks5://203.0.113.20:1080";
              rules = [
                {
                  name = "proxied";
                  port = 8;
                  outbound = "hk";
                }
                {
                  name = "blocked";
                  port = 9;
                  outbound = "block";
                }
              ];
            };
          };
        };
        router = {
          imports = [ (host 1 "192.168.0.1" null) ];
          virtualisation.vlans = lib.mkForce [
            1
            2
          ];
          networking.interfaces.eth2.ipv4.addresses = lib.mkForce [
            {
              address = "203.0.113.1";
              prefixLength = 24;
            }
          ];
          boot.kernel.sysctl."net.ipv4.ip_forward" = 1;
        };
        server.imports = [
          (host 2 "203.0.113.10" "203.0.113.1")
          web
        ];
        upstream = {
          imports = [ (host 2 "203.0.113.20" "203.0.113.1") ];
          services.microsocks = {
            enable = true;
            ip = "0.0.0.0";
            port = 1080;
          };
        };
      };
      testScript = ''
        start_all()
        router.wait_for_unit("multi-user.target")
        server.wait_for_unit("nginx.service")
        upstream.wait_for_open_port(1080)
        laptop.wait_for_unit("multi-user.target")
        box.wait_for_unit("sidegate.service")

        def asked(port: int) -> str:
            """The address that the server saw."""
            return laptop.succeed(f"curl -sS --max-time 20 http://203.0.113.10:{port}/").strip()

        def decides() -> None:
            assert asked(7) == "192.168.0.3", "a direct flow keeps the client's address"
            assert asked(8) == "203.0.113.20", "a proxied one has the upstream's"
            laptop.fail("curl -sS --max-time 3 http://203.0.113.10:9/")

        ${script}
      '';
    };
in
lib.mapAttrs' (file: _: {
  name = "vm-${lib.removeSuffix ".nix" file}";
  value = test (lib.removeSuffix ".nix" file) (import (./. + "/${file}"));
}) files
