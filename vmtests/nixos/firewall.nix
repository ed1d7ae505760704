# A NixOS firewall that filters what is forwarded and is strict about sources lets pass what the gateway has decided, and nothing else.
let
  module = import ./module.nix;
in
module
// {
  box = arguments: {
    imports = [ (module.box arguments) ];
    networking.firewall = {
      filterForward = true;
      checkReversePath = "strict";
    };
  };
}
