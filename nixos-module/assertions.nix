# What cannot work, with what is wrong and what to write instead; and what works, and may not be meant. nix/cases.nix sees each of them.
{
  config,
  lib,
  ...
}:
let
  cfg = config.services.sidegate;
  inherit (cfg) lan;
  inherit (lib) concatStringsSep mkIf;
  firewall = config.networking.firewall;
  interfaces = cfg.settings.interfaces.lan;
  isIPv6 = lib.hasInfix ":";
  bare = lib.filter (a: !lib.hasInfix "/" a) lan.address;
  own = lib.intersectLists lan.gateway (map (a: lib.head (lib.splitString "/" a)) lan.address);
  kernel = config.boot.kernelPackages.kernel.version;

  # Each string of the settings with the path of keys that leads to it.
  strings =
    path: value:
    if lib.isAttrs value then
      lib.concatLists (lib.mapAttrsToList (key: strings (path ++ [ key ])) value)
    else if lib.isList value then
      lib.concatLists (lib.imap0 (i: strings (path ++ [ (toString i) ])) value)
    else
      lib.optional (lib.isString value) {
        name = concatStringsSep "." path;
        key = lib.last path;
        inherit value;
      };
  all = strings [ ] cfg.settings;
  inline = lib.filter (
    s: s.key == "password" || builtins.match "[a-z0-9]+://[^/@]*:[^/@]+@.*" s.value != null
  ) all;
  passwordFiles = lib.filter (s: s.key == "password_file") all;
  stored = lib.filter (s: lib.hasPrefix builtins.storeDir s.value) passwordFiles;
  unknown = lib.filter (s: !lib.hasPrefix "/" s.value && !cfg.secrets ? ${s.value}) passwordFiles;
  unreadable = lib.filter (
    s: lib.hasPrefix "/" s.value && !lib.hasPrefix builtins.storeDir s.value
  ) passwordFiles;
  storedSecrets = lib.filterAttrs (_: lib.hasPrefix builtins.storeDir) cfg.secrets;

  # Kernel parameters that somebody has set otherwise.
  inherit (import ./sysctls.nix { inherit config lib; }) wanted;
  text =
    v:
    if v == true then
      "1"
    else if v == false then
      "0"
    else
      toString v;
  wrong = lib.filterAttrs (
    name: p: !lib.elem (text (config.boot.kernel.sysctl.${name} or null)) ([ p.value ] ++ p.also or [ ])
  ) wanted;

  names = list: concatStringsSep ", " (map (s: "settings.${s.name}") list);
  say = assertion: message: {
    inherit assertion;
    message = "services.sidegate: ${message}";
  };
in
{
  config = mkIf cfg.enable {
    assertions = [
      (say (inline == [ ]) ''
        ${names inline} has a password in it, which everyone on this machine could read in the Nix store.
        Put it into a file, name that in services.sidegate.secrets.NAME, and write password_file = "NAME" (and the user as username).
      '')
      (say (stored == [ ] && storedSecrets == { }) ''
        ${
          concatStringsSep ", " (
            map (s: "settings.${s.name}") stored ++ map (n: "secrets.${n}") (lib.attrNames storedSecrets)
          )
        } is a file in the Nix store, which everyone on this machine can read. Name a file outside of it, as a string and not as a path.
      '')
      (say (unknown == [ ]) ''
        ${names unknown}: there is no services.sidegate.secrets.${
          concatStringsSep ", " (map (s: s.value) unknown)
        }
        (have: ${if cfg.secrets == { } then "none" else concatStringsSep ", " (lib.attrNames cfg.secrets)}).
      '')
      (say (unreadable == [ ]) ''
        ${names unreadable} is a path, and the service is not root, to read it. Write secrets.NAME = "${
          concatStringsSep " " (map (s: s.value) unreadable)
        }" and password_file = "NAME".
      '')
      (say (lan.address == [ ] || lan.interface != null) ''
        lan.address is ${concatStringsSep ", " lan.address}, and lan.interface does not say of which interface: lan.interface = "eth0".
      '')
      (say (bare == [ ]) ''
        lan.address ${concatStringsSep ", " bare} has no prefix length: write ${lib.head (bare ++ [ "" ])}/${
          if bare != [ ] && isIPv6 (lib.head bare) then "64" else "24"
        }, or what the main router has.
      '')
      (say
        (
          lan.address == [ ]
          || lan.interface == null
          || interfaces == "auto"
          || lib.elem lan.interface interfaces
        )
        ''
          lan.interface is ${toString lan.interface}, and settings.interfaces.lan is ${
            if interfaces == "auto" then "auto" else concatStringsSep ", " interfaces
          }: leave the latter away, or add ${toString lan.interface} to it.
        ''
      )
      (say (lan.gateway == [ ] || lan.address != [ ]) ''
        lan.gateway is ${concatStringsSep ", " lan.gateway} and lan.address is empty: give the box its address, lan.address = [ "192.168.0.2/24" ].
      '')
      (say (own == [ ]) ''
        lan.gateway ${concatStringsSep ", " own} is the box's own address; it is to be the main router's.
      '')
      (say (!cfg.dhcp.enable || lib.any (a: !isIPv6 a) lan.address) ''
        dhcp.enable needs an IPv4 address of the box: lan.interface = "eth0" and lan.address = [ "192.168.0.2/24" ].
      '')
      (say (cfg.advertisePrefix == null || cfg.settings.ipv6 != "advertise") ''
        advertisePrefix makes systemd-networkd advertise the box, and settings.ipv6 = "advertise" makes the gateway do it: one of them.
      '')
      (say (cfg.advertisePrefix == null || lan.address != [ ]) ''
        advertisePrefix needs lan.interface and lan.address: the prefix is advertised on an interface that this module configures.
      '')
      (say
        (
          !(config.services.radvd.enable && (cfg.advertisePrefix != null || cfg.settings.ipv6 == "advertise"))
        )
        ''
          services.radvd advertises, too. Switch it off, or leave settings.ipv6 unmanaged and give radvd AdvDefaultPreference high.
        ''
      )
      (say
        (
          lan.address == [ ]
          || lan.interface == null
          || config.networking.interfaces.${lan.interface}.ipv4.addresses or [ ] == [ ]
        )
        ''
          networking.interfaces.${toString lan.interface} has addresses, and lan.address too: one of them.
        ''
      )
      (say (!firewall.enable || !cfg.openFirewall || config.networking.nftables.enable) ''
        the firewall is iptables', since networking.nftables.enable is false, and would drop what the gateway proxies.
        Leave networking.nftables.enable away, or set openFirewall = false and accept packets of mark 0x1000000/0xf000000 in INPUT yourself.
      '')
      (say (!firewall.enable || !cfg.openFirewall || firewall.backend != "firewalld") ''
        networking.firewall.backend is ${firewall.backend}, whose rules this module does not write: networking.firewall.backend = "nftables",
        or openFirewall = false and accept packets of mark 0x1000000/0xf000000 yourself.
      '')
      (say (wrong == { }) ''
        ${
          concatStringsSep "; " (
            lib.mapAttrsToList (
              name: p:
              "boot.kernel.sysctl.\"${name}\" is ${text (config.boot.kernel.sysctl.${name} or null)}, so ${p.why}"
            ) wrong
          )
        }. Leave it away: the module sets it.
      '')
      (say (lib.versionAtLeast kernel "6.6") ''
        the kernel is ${kernel}, and sidegate needs 6.6 or newer: boot.kernelPackages = pkgs.linuxPackages;
      '')
    ];

    warnings = lib.mkMerge [
      (mkIf (cfg.settings.return_path == "asymmetric" && config.networking.nat.enable) [
        ''
          services.sidegate: networking.nat.enable masquerades what comes from its internal interfaces. If the LAN is one of them, replies
          of direct flows come back through the box whatever return_path says; where it is in the LAN, beside the main router, it needs no NAT.
        ''
      ])
      (mkIf (cfg.dhcp.enable && !cfg.settings ? dns) [
        ''
          services.sidegate: the DHCP server names the box as DNS server, and without settings.dns nothing answers there but what you run
          on port 53 yourself: settings.dns = { upstreams.isp = "udp://${
            lib.head (lan.gateway ++ [ "192.168.0.1" ])
          }"; default = "isp"; };
        ''
      ])
      (mkIf (!cfg.checkSettings) [
        ''
          services.sidegate: the settings are not checked when the system is built${
            lib.optionalString (
              cfg.outside != [ ]
            ) ", since ${concatStringsSep ", " cfg.outside} are files of the running box"
          }. A mistake in them keeps the service from starting.
        ''
      ])
    ];
  };
}
