{
  config,
  lib,
  pkgs,
  ...
}:
let
  inherit (lib) mkOption mkEnableOption types;
  cfg = config.services.sidegate;
  json = pkgs.formats.json { };
in
{
  options.services.sidegate = {
    enable = mkEnableOption "sidegate, a side-router gateway";

    package = mkOption {
      type = types.package;
      default = pkgs.sidegate;
      defaultText = lib.literalExpression "pkgs.sidegate";
      description = "The package; the flake's module brings its own.";
    };

    settings = mkOption {
      description = ''
        The configuration, with the keys of the README. It is checked by `sidegate check` when the system is built, and read again without
        a restart when only it changes. It lies in the Nix store, so secrets are named by a file (`password_file`) and given in
        {option}`services.sidegate.secrets`.
      '';
      example = lib.literalExpression ''
        {
          outbounds.hk = { url = "socks5://10.0.0.7:1080"; username = "me"; password_file = "hk"; };
          rules = [ { name = "nas"; ip_is_private = true; outbound = "direct"; } ];
          default = "hk";
        }
      '';
      default = { };
      type = types.submodule {
        freeformType = json.type;
        # Only what this module itself looks at has a type; the rest is the program's to judge.
        options = {
          interfaces.lan = mkOption {
            type = types.either (types.enum [ "auto" ]) (types.nonEmptyListOf types.str);
            default = if cfg.lan.interface != null then [ cfg.lan.interface ] else "auto";
            defaultText = lib.literalMD "{option}`services.sidegate.lan.interface`, else `auto`: the interface of the default route";
            example = [ "eth0" ];
            description = "Where clients are.";
          };
          default = mkOption {
            type = types.str;
            default = "direct";
            example = "hk";
            description = "Where flows go that no rule decides: `direct`, `block`, or an outbound.";
          };
          ipv6 = mkOption {
            type = types.enum [
              "unmanaged"
              "advertise"
            ];
            default = "unmanaged";
            description = "Whether the gateway advertises itself as IPv6 router, beside the main one.";
          };
          return_path = mkOption {
            type = types.enum [
              "asymmetric"
              "symmetric"
              "auto"
            ];
            default = "asymmetric";
            description = "How replies of direct flows reach the client.";
          };
        };
      };
    };

    checkSettings = mkOption {
      type = types.bool;
      default = !(lib.any (path: !lib.hasPrefix builtins.storeDir path) cfg.outside);
      defaultText = lib.literalMD "`true`, unless `settings.geodata` names files that are not in the Nix store";
      description = "Whether the build runs `sidegate check`. It cannot where the settings name files that only the running box has.";
    };

    outside = mkOption {
      type = types.listOf types.str;
      internal = true;
      readOnly = true;
      default =
        let
          data = cfg.settings.geodata or { };
          files =
            lib.optional (data ? geosite) data.geosite
            ++ lib.optional (data ? geoip) data.geoip
            ++ lib.attrValues (data.sets or { });
        in
        map toString files;
      description = "The files of lists that the settings name.";
    };

    secrets = mkOption {
      type = types.attrsOf types.str;
      default = { };
      example = {
        hk = "/run/keys/hk";
      };
      description = ''
        Files with one secret each, by the name that the settings call them (`password_file = "hk"`). systemd hands them to the service
        (`LoadCredential=`); they may be readable by root alone. A path as a string, for a Nix path would be copied to the store.
      '';
    };

    lan = {
      interface = mkOption {
        type = types.nullOr types.str;
        default = null;
        example = "eth0";
        description = "The LAN interface, where this module is to configure it.";
      };
      address = mkOption {
        type = types.listOf types.str;
        default = [ ];
        example = [ "192.168.0.2/24" ];
        description = "Static addresses of the box, with their prefix lengths. With any, systemd-networkd configures the interface.";
      };
      gateway = mkOption {
        type = types.listOf types.str;
        default = [ ];
        example = [ "192.168.0.1" ];
        description = "The main router, for each family that has an address.";
      };
      nameservers = mkOption {
        type = types.listOf types.str;
        default = cfg.lan.gateway;
        defaultText = lib.literalExpression "config.services.sidegate.lan.gateway";
        description = "DNS servers of the box itself.";
      };
    };

    dhcp = {
      enable = mkEnableOption "a DHCP server on the LAN that names the box as gateway and DNS server (systemd-networkd's; switch the main router's off)";
      first = mkOption {
        type = types.ints.positive;
        default = 100;
        description = "The first address that is handed out, counted from the start of the subnet.";
      };
      size = mkOption {
        type = types.ints.positive;
        default = 100;
        description = "How many are handed out.";
      };
    };

    advertisePrefix = mkOption {
      type = types.nullOr types.str;
      default = null;
      example = "fd00:0:0:1::/64";
      description = ''
        An IPv6 prefix that the box advertises as the only IPv6 router of the LAN (systemd-networkd). Where the main router advertises
        one, `settings.ipv6 = "advertise"` is what makes clients take the box.
      '';
    };

    openFirewall = mkOption {
      type = types.bool;
      default = true;
      description = "Whether the NixOS firewall lets pass what the gateway has decided, which it knows by the packets' marks.";
    };
  };
}
