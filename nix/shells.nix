# What `make demo`, `test`, `bench`, `lint`, `generate` and `nix-check` need: scripts/install-deps.sh asks for these commands.
{ pkgs, ... }:
{
  default = pkgs.mkShell {
    packages = [
      pkgs.go_1_26
      (pkgs.callPackage ./toolchain.nix { })
      (pkgs.runCommand "danted" { } "mkdir -p $out/bin; ln -s ${pkgs.dante}/bin/sockd $out/bin/danted") # Debian's name of it
    ]
    ++ (with pkgs; [
      bind.dnsutils
      curl
      dnsmasq
      dnsperf
      git
      gnumake
      iperf3
      iproute2
      iptables
      iputils
      microsocks
      nftables
      nginx
      nixfmt
      procps
      radvd
      shellcheck
      squid
      unbound
      wireguard-tools
    ]);
  };
}
