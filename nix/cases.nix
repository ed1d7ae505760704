# Systems that use the module: those of `good` with all that it makes of them, as text; those of `odd` and `bad` with what it says of them.
# make nix-check compares both with nixos-module/goldens, and the tests run the first.
{ self, nixpkgs }:
let
  inherit (nixpkgs) lib;

  system =
    module:
    lib.nixosSystem {
      modules = [
        self.nixosModules.default
        {
          nixpkgs.hostPlatform = "x86_64-linux";
          system.stateVersion = "26.05";
          fileSystems."/" = {
            device = "none";
            fsType = "tmpfs";
          };
          boot.loader.grub.enable = false;
          services.sidegate.enable = true;
        }
        module
      ];
    };

  lan = {
    interface = "eth0";
    address = [
      "192.168.0.2/24"
      "fd00::2/64"
    ];
    gateway = [ "192.168.0.1" ];
  };
  proxied = {
    outbounds.hk = {
      url = "socks5://10.0.0.7:1080";
      username = "me";
      password_file = "hk";
    };
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
    default = "direct";
  };

  good = {
    # nothing but enable = true
    plain = { };

    # with a proxy, by a secret
    box = {
      services.sidegate = {
        inherit lan;
        settings = proxied;
        secrets.hk = "/run/keys/hk";
      };
    };

    # a firewall that filters what is forwarded, DHCP and advertisements by the box
    router = {
      networking.firewall.filterForward = true;
      services.sidegate = {
        inherit lan;
        dhcp.enable = true;
        advertisePrefix = "fd00::/64";
        secrets.hk = "/run/keys/hk";
        settings = proxied // {
          gateway.local = true;
          dns = {
            upstreams.isp = "udp://192.168.0.1";
            default = "isp";
          };
        };
      };
    };
  };

  bad = {
    inline-password.services.sidegate.settings.outbounds.us.password = "hunter2";
    inline-url.services.sidegate.settings.outbounds.us.url = "socks5://me:hunter2@10.0.0.7:1080";
    stored-secret.services.sidegate.secrets.hk =
      "${builtins.storeDir}/00000000000000000000000000000000-hk";
    unknown-secret.services.sidegate.settings = proxied;
    unreadable-secret.services.sidegate.settings = lib.recursiveUpdate proxied {
      outbounds.hk.password_file = "/run/keys/hk";
    };
    missing-interface.services.sidegate.lan = removeAttrs lan [ "interface" ];
    bare-address.services.sidegate.lan = lan // {
      address = [ "192.168.0.2" ];
    };
    other-interface.services.sidegate = {
      inherit lan;
      settings.interfaces.lan = [ "eth1" ];
    };
    gateway-alone.services.sidegate.lan.gateway = [ "192.168.0.1" ];
    own-gateway.services.sidegate.lan = lan // {
      gateway = [
        "192.168.0.1"
        "fd00::2"
      ];
    };
    dhcp-alone.services.sidegate.dhcp.enable = true;
    two-advertisers.services.sidegate = {
      inherit lan;
      advertisePrefix = "fd00::/64";
      settings.ipv6 = "advertise";
    };
    prefix-alone.services.sidegate.advertisePrefix = "fd00::/64";
    radvd = {
      services.sidegate.settings.ipv6 = "advertise";
      services.radvd = {
        enable = true;
        config = "interface eth0 { };";
      };
    };
    two-addresses = {
      services.sidegate = { inherit lan; };
      networking.interfaces.eth0.ipv4.addresses = [
        {
          address = "192.168.0.9";
          prefixLength = 24;
        }
      ];
    };
    iptables.networking.nftables.enable = false;
    firewalld.networking.firewall.backend = "firewalld";
    redirects.boot.kernel.sysctl."net.ipv4.conf.all.send_redirects" = 1;
    old-kernel =
      { pkgs, ... }:
      {
        boot.kernelPackages = pkgs.linuxPackages_6_1;
      };
  };

  # What works, and may not be what is meant.
  odd = {
    nat.networking.nat = {
      enable = true;
      externalInterface = "eth1";
      internalInterfaces = [ "eth0" ];
    };
    dhcp-without-dns.services.sidegate = {
      inherit lan;
      dhcp.enable = true;
    };
    unchecked.services.sidegate.settings.geodata.geosite = "/var/lib/geosite.dat";
  };

  # Evaluation itself refuses these; the message is the module system's. A script sees it, for Nix code cannot.
  ugly = {
    option-typo.services.sidegate.setings = { };
    type.services.sidegate.settings.return_path = "triangular";
    second-typo.services.sidegate.lan.adress = [ ];
  };

  lines =
    keep: text:
    lib.concatMapStrings (l: l + "\n") (
      lib.filter keep (lib.splitString "\n" (lib.removeSuffix "\n" text))
    );
  # A golden is of the module, and not of a version of nixpkgs.
  withoutHashes =
    text:
    lib.concatMapStrings (part: if lib.isList part then "" else part) (
      builtins.split "${builtins.storeDir}/[a-z0-9]{32}-[^/]*" (builtins.unsafeDiscardStringContext text)
    );

  # What the README shows, word for word.
  readme =
    let
      shown = lib.head (lib.splitString "```" (lib.elemAt (lib.splitString "```nix\n" (builtins.readFile ../README.md)) 1));
      inherit (import (builtins.toFile "readme.nix" shown)) services;
      inherit (system { inherit services; }) config;
      wrong = config.warnings ++ map (a: a.message) (lib.filter (a: !a.assertion) config.assertions);
    in
    assert lib.assertMsg (wrong == [ ]) "what the README shows is not right: ${lib.concatStrings wrong}";
    config;

  texts =
    module:
    let
      inherit (system module) config;
      enabled = lib.filterAttrs (_: t: t.enable) config.networking.nftables.tables;
    in
    {
      "sidegate.json" = builtins.toJSON config.services.sidegate.settings;
      "sysctl.conf" = lines (lib.hasPrefix "net.") config.environment.etc."sysctl.d/60-nixos.conf".text;
      "sidegate.service" = withoutHashes (
        lines (
          l: !lib.hasPrefix "Environment=" l && !lib.hasPrefix "X-Reload" l
        ) config.systemd.units."sidegate.service".text
      );
      "tmpfiles.conf" = builtins.toJSON config.systemd.tmpfiles.settings."10-sidegate";
      "warnings.txt" = lib.concatStrings config.warnings;
      "ruleset.nft" = lib.concatStrings (
        lib.mapAttrsToList (_: t: "table ${t.family} ${t.name} {\n${t.content}}\n") enabled
      );
    }
    // lib.mapAttrs (_: unit: unit.text) (
      lib.filterAttrs (file: _: lib.hasPrefix "10-sidegate" file) config.systemd.network.units
    );

  # Of each assertion, or warning, of the module: what it says of a system, or null.
  refusals =
    module:
    map (a: if a.assertion then null else a.message) (
      lib.concatMap (d: lib.optionals (lib.hasSuffix "nixos-module/assertions.nix" d.file) d.value)
        (system module).options.assertions.definitionsWithLocations
    );
  # Read before the module system merges them, which forgets those that are not given.
  warnings =
    module:
    let
      inherit (system module) config;
      module' = import ../nixos-module/assertions.nix { inherit config lib; };
    in
    map (w: if w.condition then lib.concatStrings w.content else null)
      module'.config.content.warnings.contents;

  # Every case is spoken of, and everything that can be said is said of a case.
  spoken =
    what: cases: said:
    let
      all = lib.mapAttrs (_: said) cases;
      never = lib.foldl' (lib.zipListsWith (a: b: if a == null then b else a)) (lib.head (
        lib.attrValues all
      )) (lib.attrValues all);
    in
    assert lib.assertMsg (!lib.elem null never)
      "nix/cases.nix: no case sees ${what} ${
        toString (1 + lib.lists.findFirstIndex (s: s == null) 0 never)
      } of nixos-module/assertions.nix";
    lib.mapAttrs' (
      name: said:
      lib.nameValuePair "${name}.txt" (
        if lib.all (s: s == null) said then
          throw "${name}: there is no ${what}"
        else
          lib.concatStrings (lib.filter (s: s != null) said)
      )
    ) all;
in
{
  inherit system;
  goldens = lib.mapAttrs (_: texts) good // {
    readme."sidegate.json" = builtins.toJSON readme.services.sidegate.settings;
    warned = spoken "warning" odd warnings;
    refused = spoken "assertion" bad refusals;
  };
  ugly = lib.mapAttrs (_: module: (system module).config.services.sidegate.settings.return_path) ugly;
}
