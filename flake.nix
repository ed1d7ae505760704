{
  description = "A side-router gateway: decides in eBPF which flows go direct, through a proxy, or nowhere";

  inputs.nixpkgs.url = "github:NixOS/nixpkgs/nixos-26.05";

  outputs =
    { self, nixpkgs }:
    let
      inherit (nixpkgs) lib;
      # For each system what a file (or function) makes of its packages, to which sidegate has been added.
      perSystem =
        file:
        lib.genAttrs [ "x86_64-linux" "aarch64-linux" ] (
          system:
          (if lib.isFunction file then file else import file) {
            inherit self lib;
            pkgs = nixpkgs.legacyPackages.${system}.extend self.overlays.default;
          }
        );
    in
    {
      overlays.default = import ./nix/overlay.nix {
        version = self.shortRev or self.dirtyShortRev or "unknown";
      };
      nixosModules.default = {
        key = "${self}#nixosModules.default"; # once, where the appliance is imported beside it
        imports = [
          ./nixos-module
          (
            { pkgs, lib, ... }:
            {
              services.sidegate.package = lib.mkDefault (pkgs.extend self.overlays.default).sidegate;
            }
          )
        ];
      };
      nixosModules.appliance.imports = [
        self.nixosModules.default
        ./nixos-module/appliance.nix
      ];
      nixosConfigurations = lib.mapAttrs' (
        system: _:
        lib.nameValuePair (if system == "x86_64-linux" then "gateway" else "gateway-aarch64") (
          lib.nixosSystem {
            modules = [
              self.nixosModules.appliance
              { nixpkgs.hostPlatform = system; }
            ];
          }
        )
      ) self.packages;
      packages = perSystem ./nix/packages.nix;
      checks = perSystem ./nix/checks.nix;
      lib.cases = import ./nix/cases.nix { inherit self nixpkgs; };
      devShells = perSystem ./nix/shells.nix;
      formatter = perSystem ({ pkgs, ... }: pkgs.nixfmt-tree);
    };
}
