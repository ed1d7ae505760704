# Kernel parameters, and the LAN interface where it is this module's to configure.
{ config, lib, ... }:
let
  cfg = config.services.sidegate;
  lan = cfg.settings.interfaces.lan;
  managed = cfg.lan.address != [ ];
  inherit (import ./sysctls.nix { inherit config lib; }) wanted;
  ipv4 = lib.filter (a: !lib.hasInfix ":" a) cfg.lan.address;
in
{
  config = lib.mkIf cfg.enable (
    lib.mkMerge [
      {
        # Stronger than what NixOS defaults to, weaker than the owner, whom an assertion tells.
        boot.kernel.sysctl = lib.mapAttrs (_: p: lib.mkOverride 900 p.value) wanted;
      }
      (lib.mkIf managed {
        networking.useNetworkd = lib.mkDefault true;
        systemd.network.enable = true;
        systemd.network.networks."10-sidegate-lan" = {
          matchConfig.Name = cfg.lan.interface;
          address = cfg.lan.address;
          gateway = cfg.lan.gateway;
          dns = cfg.lan.nameservers;
          networkConfig = {
            DHCP = "no";
            # Of a router that advertises itself the box takes its route, unless it has one.
            IPv6AcceptRA = !(lib.any (lib.hasInfix ":") cfg.lan.gateway) && cfg.advertisePrefix == null;
            IPv4Forwarding = true;
            IPv6Forwarding = config.networking.enableIPv6;
            DHCPServer = cfg.dhcp.enable;
            IPv6SendRA = cfg.advertisePrefix != null;
          };
          dhcpServerConfig = lib.mkIf cfg.dhcp.enable {
            PoolOffset = cfg.dhcp.first;
            PoolSize = cfg.dhcp.size;
            EmitRouter = true;
            EmitDNS = true;
            DNS = map (a: lib.head (lib.splitString "/" a)) ipv4;
          };
          ipv6Prefixes = lib.mkIf (cfg.advertisePrefix != null) [ { Prefix = cfg.advertisePrefix; } ];
        };
        networking.dhcpcd.denyInterfaces = [ cfg.lan.interface ];
        networking.networkmanager.unmanaged = lib.mkIf config.networking.networkmanager.enable [
          cfg.lan.interface
        ];
      })
    ]
  );
}
