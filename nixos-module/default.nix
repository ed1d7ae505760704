# services.sidegate: what it can be told is in options.nix, what it refuses and why in assertions.nix.
{
  imports = [
    ./options.nix
    ./assertions.nix
    ./service.nix
    ./network.nix
    ./firewall.nix
  ];
}
