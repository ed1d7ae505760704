{
  self,
  lib,
  pkgs,
}:
let
  system = pkgs.stdenv.hostPlatform.system;
  gateway = lib.findFirst (s: s.pkgs.stdenv.hostPlatform.system == system) null (
    lib.attrValues self.nixosConfigurations
  );
  inherit (gateway.config.system.build) images;
  appliance = lib.importJSON ../images/appliance.json;
  inherit (appliance) paths;
  options = gateway.options.services.sidegate;
in
{
  inherit (pkgs) sidegate;
  default = pkgs.sidegate;

  # The appliance, for a CD or stick, a virtual machine, and a disk.
  inherit (images) iso raw-efi;
  qcow2 = images.qemu-efi;

  # The gateway alone: run it with host networking and the capabilities of images/appliance.json.
  oci = pkgs.dockerTools.buildLayeredImage {
    name = appliance.hostname;
    tag = pkgs.sidegate.version;
    contents = [
      (pkgs.writeTextDir "${paths.configuration}/sidegate.yaml" (builtins.toJSON appliance.settings))
    ];
    config = {
      Entrypoint = [
        (lib.getExe pkgs.sidegate)
        "run"
        "-c"
        "${paths.configuration}/sidegate.yaml"
        "--data-dir"
        paths.data
      ];
      Volumes.${paths.data} = { };
      StopSignal = "SIGTERM";
      Labels."org.opencontainers.image.version" = pkgs.sidegate.version;
    };
  };

  options-doc =
    (pkgs.nixosOptionsDoc {
      options.services.sidegate = options;
      transformOptions =
        o: o // { declarations = map (d: lib.removePrefix "${self}/" (toString d)) o.declarations; };
    }).optionsCommonMark;
}
