# The kernel parameters of the program's list (`sidegate sysctls --json`) that this system needs, by name. Of an interface that is found
# only at run time all interfaces get them: sysctl.d(5) takes patterns.
{ config, lib }:
let
  cfg = config.services.sidegate;
  appliance = lib.importJSON ../images/appliance.json;
  lan = cfg.settings.interfaces.lan;
  interfaces = if lan == "auto" then [ "*" ] else map (lib.replaceStrings [ "." ] [ "/" ]) lan;
  bridged = lan != "auto" && lib.any (i: config.networking.bridges ? ${i}) lan;
  networkd = cfg.lan.address != [ ] || config.networking.useNetworkd; # takes advertisements itself, with accept_ra=0

  needed =
    p:
    if lib.hasPrefix "net.bridge." p.name then
      bridged
    else if lib.hasPrefix "net.ipv6." p.name then
      config.networking.enableIPv6 && !(networkd && lib.hasInfix "<uplink>" p.name)
    else
      true;
  named =
    p: lib.unique (map (i: lib.replaceStrings [ "<lan>" "<uplink>" ] [ i i ] p.name) interfaces);
in
{
  wanted =
    lib.listToAttrs (
      lib.concatMap (p: map (name: lib.nameValuePair name p) (named p)) (
        lib.filter needed appliance.sysctls
      )
    )
    // {
      # the other name of ip_forward, which NixOS sets too
      "net.ipv4.conf.all.forwarding" = lib.findFirst (
        p: p.name == "net.ipv4.ip_forward"
      ) null appliance.sysctls;
    };
}
