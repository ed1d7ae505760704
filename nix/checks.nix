{
  self,
  lib,
  pkgs,
}:
let
  # The tests need more of the tree than the program does.
  source =
    files:
    lib.fileset.toSource {
      root = ../.;
      fileset = lib.fileset.unions (
        [
          ../go.mod
          ../go.sum
          ../appliance
        ]
        ++ files
      );
    };

  # A check with the modules that the program is built from.
  withModules =
    name: attributes:
    pkgs.sidegate.overrideAttrs (
      {
        pname = "sidegate-${name}";
        installPhase = "touch $out";
        dontFixup = true;
      }
      // attributes
    );
in
{
  # The committed object is what clang 19 makes of bpf/.
  bpf-object = withModules "bpf-object" {
    src = source [ ../bpf ];
    nativeBuildInputs = pkgs.sidegate.nativeBuildInputs ++ [ (pkgs.callPackage ./toolchain.nix { }) ];
    buildPhase = ''
      cp appliance/datapath/gateway_bpfel.{o,go} "$TMPDIR"
      go generate ./appliance/datapath
      for f in gateway_bpfel.o gateway_bpfel.go; do
        cmp "$TMPDIR/$f" "appliance/datapath/$f" || { echo "$f is not what bpf/ compiles to: make generate" >&2; exit 1; }
      done
    '';
  };

  # What needs neither root nor a network.
  unit = withModules "unit" {
    src = source [
      ../README.md
      ../images/appliance.json
    ]; # what has the list of kernel parameters, too
    buildPhase = "go test ./appliance/{policy,sniff,sysctl,config,geodata}/...";
  };

  # What the module makes of nix/cases.nix, and refuses.
  module =
    let
      directory = name: files: pkgs.linkFarm name (lib.mapAttrs pkgs.writeText files);
      made = pkgs.linkFarm "goldens" (lib.mapAttrs directory self.lib.cases.goldens);
    in
    pkgs.runCommand "sidegate-nixos-module" { }
      "diff -r ${../nixos-module/goldens} ${made} && touch $out";

  format = pkgs.runCommand "sidegate-nix-format" { nativeBuildInputs = [ pkgs.nixfmt ]; } ''
    find ${
      lib.fileset.toSource {
        root = ../.;
        fileset = lib.fileset.fileFilter (f: f.hasExt "nix") ../.;
      }
    } -name '*.nix' -exec nixfmt --check {} +
    touch $out
  '';
}
