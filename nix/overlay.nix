{ version }:
final: _prev: {
  sidegate = final.callPackage ./package.nix {
    inherit version;
    buildGoModule = final.buildGo126Module; # go.mod asks for it, whatever the release's own is
  };
}
