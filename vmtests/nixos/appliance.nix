# The appliance, configured by a drive: it has its address from there. What is on a drive is what it is after a restart, whatever was changed since.
{
  config = "/run/sidegate-configuration/sidegate.yaml";
  scenarios = [
    "direct,_proxied_and_blocked"
    "names"
    "own_connections"
    "reload"
    "crash"
    "IPv6_by_advertisements"
    "a_firewall_that_sees_one_half"
  ];
  box =
    {
      self,
      pkgs,
      lib,
      place,
    }:
    let
      network = pkgs.writeText "network" (
        lib.concatLines (
          [ "interface = ${place.interface}" ]
          ++ map (a: "address = ${a}") place.address
          ++ map (a: "gateway = ${a}") place.gateway
        )
      );
      drive =
        pkgs.runCommand "drive"
          {
            nativeBuildInputs = [
              pkgs.dosfstools
              pkgs.mtools
            ];
          }
          ''
            mkfs.vfat -C -n SIDEGATE $out 2048
            mcopy -i $out ${network} ::network
          '';
    in
    {
      imports = [ self.nixosModules.appliance ];
      virtualisation.qemu.options = [ "-drive if=virtio,format=raw,readonly=on,file=${drive}" ];
    };
}
