{ lib, pkgs, ... }:
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
    src = source [ ../README.md ]; # its table of kernel parameters is compared
    buildPhase = "go test ./appliance/{policy,sniff,sysctl,config,geodata}/...";
  };

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
