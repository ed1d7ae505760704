{ pkgs, ... }:
{
  inherit (pkgs) sidegate;
  default = pkgs.sidegate;
}
