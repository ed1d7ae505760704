# What the gateway has decided about is marked (ARCHITECTURE.md, Marks), and the NixOS firewall lets it pass by that. That filterForward
# drops what conntrack calls invalid, as it does the later packets of an asymmetric flow, the gateway sees and exempts them from tracking.
{ config, lib, ... }:
let
  cfg = config.services.sidegate;
in
{
  config = lib.mkIf (cfg.enable && cfg.openFirewall) {
    networking.nftables.enable = lib.mkDefault true;

    networking.firewall = {
      # Its route by the mark leads to lo, so the check of the source says no. The box's own steered packets come by lo.
      extraReversePathFilterRules = ''
        meta mark & 0x0f000000 != 0 accept comment "decided by sidegate"
        iifname "lo" accept comment "the box's own, steered by sidegate"
      '';
      extraInputRules = ''
        meta mark & 0x0f000000 == 0x01000000 accept comment "proxied by sidegate"
      '';
      extraForwardRules = ''
        meta mark & 0x0f000000 == 0x04000000 accept comment "direct, by sidegate"
        meta mark & 0x0f000000 == 0x0c000000 accept comment "direct and translated, by sidegate"
      '';
      interfaces = lib.mkIf (cfg.dhcp.enable && cfg.lan.interface != null) {
        ${cfg.lan.interface}.allowedUDPPorts = [ 67 ];
      };
    };
  };
}
